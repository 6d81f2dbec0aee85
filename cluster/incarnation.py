"""One life of a worker or a gateway inside its actor: it starts once, and its process ends when it fails.

1. `start` may be asked again, by a restarted supervisor: it gives the same answer. A fault that the part names
   itself (SteelyardError) comes back as a record, because an actor framework wraps exceptions.
2. `failed` returns the reason when the part can no longer serve; soon after, the process ends itself, so that an
   incarnation never outlives its engine, whether anyone was listening or not.
It knows no Ray.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Generic, Protocol, TypeVar

from engine.errors import SteelyardError
from engine.types import ErrorInfo

LAST_WORDS_S = 1.0  # for `failed` to reach the supervisor before the process ends

Started = TypeVar("Started", covariant=True)
Answer = TypeVar("Answer")


class Part(Protocol[Started]):
    """What cluster.worker.Worker and cluster.gateway.Gateway have in common."""

    async def start(self) -> Started: ...

    async def failed(self) -> str: ...

    async def stop(self) -> None: ...


async def told(work: Awaitable[Answer]) -> Answer | ErrorInfo:
    """Its answer, or the fault that the part names itself, as a record."""
    try:
        return await work
    except SteelyardError as error:
        return ErrorInfo(error.code, error.message)


class Incarnation(Generic[Started]):
    def __init__(self, part: Part[Started], end_process: Callable[[int], None] = os._exit) -> None:
        self._part = part
        self._end_process = end_process
        self._starting: asyncio.Task[Started | ErrorInfo] | None = None
        self._failing: asyncio.Task[str] | None = None

    async def start(self) -> Started | ErrorInfo:
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        return await asyncio.shield(self._starting)

    async def failed(self) -> str:
        assert self._failing is not None, "failed() is asked of a part that has started"
        return await asyncio.shield(self._failing)

    async def stop(self) -> None:
        if self._failing is not None:
            self._failing.cancel()
        await self._part.stop()

    async def _start(self) -> Started | ErrorInfo:
        started = await told(self._part.start())
        if isinstance(started, ErrorInfo):
            return started
        self._failing = asyncio.create_task(self._end_when_failed())
        return started

    async def _end_when_failed(self) -> str:
        reason = await self._part.failed()
        asyncio.get_running_loop().call_later(LAST_WORDS_S, self._end_process, 1)
        return reason
