"""The ledgers of requests that have ended: the last ones in memory, and all of them as lines of a file.

1. `add` keeps a line and hands it to the file's writer, which never holds up the loop: it is a thread with a bounded
   queue, and what does not fit there is counted and lost;
2. at `max_bytes` the file becomes `FILE.1`, in place of the one before, and a new one begins: so two are the most;
3. a file that cannot be written is told once in the log and given up; requests go on.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Protocol

from router.ledger import Ledger, Outcome, Timeline

MAX_KEPT = 1024  # some hundred bytes each

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LedgerLine:
    """A request that has ended. `time`: when, in seconds since 1970; `end`: its finish reason."""

    request_id: str
    time: float
    end: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    timeline: Timeline


@dataclass(frozen=True, slots=True)
class LedgersView:
    requests: tuple[LedgerLine, ...]


class LineSink(Protocol):
    """Where lines go. `put` does not wait."""

    def put(self, line: str) -> None: ...


class LedgerLog:
    """`sink` None: no file."""

    def __init__(self, wall_clock: Callable[[], float], sink: LineSink | None = None, max_kept: int = MAX_KEPT) -> None:
        self.wall_clock = wall_clock
        self._sink = sink
        self._last: deque[LedgerLine] = deque(maxlen=max_kept)

    def add(self, ledger: Ledger, outcome: Outcome) -> None:
        line = LedgerLine(
            outcome.request_id, self.wall_clock(), outcome.end, outcome.prompt_tokens, outcome.cached_tokens,
            outcome.completion_tokens, ledger.timeline(),
        )  # fmt: skip
        self._last.append(line)
        if self._sink is not None:
            self._sink.put(json.dumps(asdict(line)))

    def last(self, count: int) -> LedgersView:
        """The newest ones, oldest first."""
        return LedgersView(tuple(self._last)[-count:] if count > 0 else ())
