"""The event log: what happened when, in a form that two runs of the same seed share byte for byte.

Records are added as they are known. Where steps are advanced together (burst.py) that is later than they happened, so
the log as a text is in order of time, and of equal times in the order in which they were added.
"""

from __future__ import annotations

import asyncio
import hashlib
from operator import itemgetter


class EventLog:
    """Append-only. A record is a line: time, actor, what, then key=value sorted by key."""

    def __init__(self, keep: bool = True, detailed: bool = True) -> None:
        """Without `keep` only the digest and the number of records are known: enough to compare long runs. If not
        `detailed` nobody needs to add single steps and tokens."""
        self.detailed = detailed
        self._lines: list[tuple[float, str]] | None = [] if keep else None
        self._digest = hashlib.blake2b(digest_size=16)
        self.num_records = 0

    def add(self, actor: str, what: str, at: float | None = None, **values: str | int | float | None) -> None:
        """Record an event, of the running loop's time unless it was at another."""
        time = asyncio.get_running_loop().time() if at is None else at
        fields = "".join(f" {name}={_written(values[name])}" for name in sorted(values))
        line = f"{time:.9f} {actor} {what}{fields}\n"
        self.num_records += 1
        self._digest.update(line.encode())
        if self._lines is not None:
            self._lines.append((time, line))

    def to_bytes(self) -> bytes:
        assert self._lines is not None, "this log keeps its digest only"
        return "".join(line for _, line in sorted(self._lines, key=itemgetter(0))).encode()

    def digest(self) -> str:
        """Of all lines so far in the order of their addition, 32 hex digits."""
        return self._digest.hexdigest()


def _written(value: str | int | float | None) -> str:
    """Floats with nine digits, as the time; text so that it cannot be taken for two fields."""
    if isinstance(value, float):
        return f"{value:.9f}"
    return "_".join(str(value).split())
