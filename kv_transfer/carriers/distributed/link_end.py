"""One end of a link, as the worker has it: what was told of it, what is to come over it, and who waits for that."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from engine.errors import TransferFailed
from kv_transfer.carriers.distributed.records import Arrived, Keys
from kv_transfer.frames import Commit

Item = Arrived | Commit | TransferFailed  # what comes to a pull


@dataclass(slots=True, eq=False)
class LinkEnd:
    """One end of a link, here. `arrivals`: of each pull that somebody waits for; `unsent`: when each was ordered."""

    name: str
    row: int | None  # None: we are the producer
    said: asyncio.Future[Keys]
    opened: asyncio.Future[None]
    reason: str | None = None  # why it has ended
    unsent: deque[float] = field(default_factory=deque)
    closing_since: float | None = None
    num_pulls: int = 0
    arrivals: dict[int, asyncio.Queue[Item]] = field(default_factory=dict)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def wake(self) -> None:
        self.news.set()
        self.news = asyncio.Event()

    def end(self, reason: str) -> None:
        self.reason = reason
        error = TransferFailed(f"the link between the porters is over: {reason}")
        for future in (self.said, self.opened):
            if not future.done():
                future.set_exception(error)
                future.exception()  # it is no fault if nobody waits
        for queue in self.arrivals.values():
            queue.put_nowait(error)
        self.wake()
