"""The event log: what happened when, in a form that two runs of the same seed share byte for byte."""

from __future__ import annotations

import asyncio
import hashlib


class EventLog:
    """Append-only. A record is a line: time, actor, what, then key=value sorted by key."""

    def __init__(self, keep: bool = True) -> None:
        """Without `keep` only the digest and the number of records are known: enough to compare long runs."""
        self._lines: list[str] | None = [] if keep else None
        self._digest = hashlib.blake2b(digest_size=16)
        self.num_records = 0

    def add(self, actor: str, what: str, **values: str | int | float | None) -> None:
        """Record an event at the running loop's time."""
        fields = "".join(f" {name}={_written(values[name])}" for name in sorted(values))
        line = f"{asyncio.get_running_loop().time():.9f} {actor} {what}{fields}\n"
        self.num_records += 1
        self._digest.update(line.encode())
        if self._lines is not None:
            self._lines.append(line)

    def to_bytes(self) -> bytes:
        assert self._lines is not None, "this log keeps its digest only"
        return "".join(self._lines).encode()

    def digest(self) -> str:
        """Of all lines so far, 32 hex digits."""
        return self._digest.hexdigest()


def _written(value: str | int | float | None) -> str:
    """Floats with nine digits, as the time; text so that it cannot be taken for two fields."""
    if isinstance(value, float):
        return f"{value:.9f}"
    return "_".join(str(value).split())
