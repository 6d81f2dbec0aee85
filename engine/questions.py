"""Questions to the engine: commands that it answers with its next outputs.

Each has a deadline. What is granted after nobody waits any more is given back at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TypeVar

from engine.errors import Overloaded
from engine.types import Command, Freeze, Frozen, Key, Lend, Lent, Release, Reserve, Reserved, Resume, StepOutputs

ANSWER_TIMEOUT_S = 4.0  # less than a producer's patience with us, so that it hears why

Answer = TypeVar("Answer", Reserved, Lent, Frozen)
_Waiting = dict[Key, asyncio.Future[Answer]]


class Questions:
    """One waits for each key and kind of question at a time."""

    def __init__(self, send: Callable[[Command], None]) -> None:
        self._send = send
        self._reserving: _Waiting[Reserved] = {}
        self._lending: _Waiting[Lent] = {}
        self._freezing: _Waiting[Frozen] = {}

    async def reserve(self, command: Reserve) -> Reserved:
        """Raises Overloaded when the engine does not answer in time, as the others do."""
        return await self._ask(command, self._reserving)

    async def lend(self, command: Lend) -> Lent:
        return await self._ask(command, self._lending)

    async def freeze(self, command: Freeze) -> Frozen:
        return await self._ask(command, self._freezing)

    def on_outputs(self, outputs: StepOutputs) -> None:
        for reserved in outputs.reserved:
            if not _answer(self._reserving, reserved) and reserved.block_ids is not None:
                self._send(Release(reserved.key))
        for lent in outputs.lent:
            if not _answer(self._lending, lent) and lent.names:
                self._send(Release(lent.key))
        for frozen in outputs.frozen:
            if not _answer(self._freezing, frozen) and frozen.request is not None:
                self._send(Resume(frozen.key))

    async def _ask(self, command: Reserve | Lend | Freeze, waiting: _Waiting[Answer]) -> Answer:
        answer = waiting[command.key] = asyncio.get_running_loop().create_future()
        self._send(command)
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return await answer
        except TimeoutError:
            raise Overloaded("the engine did not answer in time", retry_after_s=1) from None
        finally:
            del waiting[command.key]


def _answer(waiting: Mapping[Key, asyncio.Future[Answer]], answer: Answer) -> bool:
    """Did anybody wait for it?"""
    future = waiting.get(answer.key)
    if future is None or future.done():
        return False
    future.set_result(answer)
    return True
