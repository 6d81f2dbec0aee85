"""Streams that are held open for as long as they are needed, and then left: the cluster aborts them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any


class HeldStreams:
    """`answer` reads one stream to its end."""

    def __init__(self, answer: Callable[[], Coroutine[Any, Any, object]]) -> None:
        self._answer = answer
        self._tasks: list[asyncio.Task[object]] = []

    def __len__(self) -> int:
        return len(self._tasks)

    async def __aenter__(self) -> HeldStreams:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.keep(0)

    def open(self, count: int) -> None:
        self._tasks += [asyncio.get_running_loop().create_task(self._answer()) for _ in range(count)]

    async def keep(self, count: int) -> None:
        """Leave all but so many of those that still go on."""
        going = [task for task in self._tasks if not task.done()]
        self._tasks, gone = going[:count], going[count:]
        for task in gone:
            task.cancel()
        await asyncio.gather(*gone, return_exceptions=True)

    def all_go_on(self) -> bool:
        """False once one has come to its end. Raises what ended one early."""
        ended = [task for task in self._tasks if task.done()]
        for task in ended:
            task.result()
        return not ended
