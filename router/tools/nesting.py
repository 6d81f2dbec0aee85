"""How deep a JSON text is nested after each of its characters. Checks nothing else."""

from __future__ import annotations


class Nesting:
    def __init__(self) -> None:
        self.depth = 0
        self.in_string = False
        self._escaped = False

    def take(self, char: str) -> None:
        if self.in_string:
            self._take_in_string(char)
        elif char == '"':
            self.in_string = True
        elif char in "{[":
            self.depth += 1
        elif char in "}]":
            self.depth -= 1

    def _take_in_string(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            self.in_string = False
