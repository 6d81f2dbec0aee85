"""Reads one answer's text as its parts: reasoning first, then content and calls.

It gets text from which stop strings were cut off already. What it knows of the model are the marks to look for.
"""

from __future__ import annotations

from dataclasses import dataclass

from router.parts import CallStart, Content, Part, joined
from router.reasoning import ReasoningCounter, ReasoningMarks, ReasoningSplitter
from router.tools.formats import Marks
from router.tools.parser import CallParser


@dataclass(frozen=True, slots=True)
class Reading:
    """How the answers to one prompt are to be read; by default as they are. `names`: the functions on offer."""

    reasoning: ReasoningMarks | None = None
    is_open: bool = False  # the prompt ends inside of reasoning
    calls: Marks | None = None
    names: tuple[str, ...] = ()
    is_single: bool = False  # calls after the first are dropped

    @property
    def is_plain(self) -> bool:
        return self.reasoning is None and self.calls is None

    def new_counter(self) -> ReasoningCounter | None:
        return ReasoningCounter(self.reasoning, self.is_open) if self.reasoning else None


PLAIN = Reading()


class AnswerReader:
    """One answer. The parts are the same however its text comes in pieces."""

    def __init__(self, reading: Reading) -> None:
        self.has_calls = False
        self._splitter = ReasoningSplitter(reading.reasoning, reading.is_open) if reading.reasoning else None
        self._parser = CallParser(reading.calls, reading.names, reading.is_single) if reading.calls else None

    def read(self, text: str, is_last: bool) -> tuple[Part, ...]:
        parts = self._split(text, is_last)
        if self._parser is not None:
            parts = self._parse(parts, is_last)
        self.has_calls = self.has_calls or any(isinstance(part, CallStart) for part in parts)
        return parts

    def _split(self, text: str, is_last: bool) -> tuple[Part, ...]:
        if self._splitter is None:
            return (Content(text),) if text else ()
        parts = self._splitter.push(text)
        return joined((*parts, *self._splitter.flush())) if is_last else parts

    def _parse(self, parts: tuple[Part, ...], is_last: bool) -> tuple[Part, ...]:
        assert self._parser is not None
        parsed: list[Part] = []
        for part in parts:
            parsed += self._parser.push(part.text) if isinstance(part, Content) else (part,)
        return joined((*parsed, *self._parser.flush())) if is_last else tuple(parsed)
