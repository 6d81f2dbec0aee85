"""Rebalancing: decode workers that run out of KV blocks give running requests to those that have more.

`choose_move` is pure: from loads to a request and where it goes. WindServe (2025) moves long contexts first, for they
free the most; it also copies them ahead, so that only the tail is left to move. Here the longest goes that leaves its
target with room enough that nothing moves back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.errors import SteelyardError
from engine.types import Role
from router.membership import Member
from router.policies.snapshot import WorkerLoad

PERIOD_S = 0.5
MARGIN = 2.0  # how many times the threshold a target must keep free

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Running:
    """A request that generates on a worker; `num_tokens` so far, with its prompt."""

    request_id: str
    worker: Member
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Proposal:
    """Which request is to go where."""

    request_id: str
    target: Member


class Mobile(Protocol):
    """Requests that can be moved (router/moves.py)."""

    def generating(self) -> list[Running]: ...

    async def migrate(self, request_id: str, target: Member) -> None: ...

    async def back_up(self, request_id: str, target: Member) -> None: ...


class Rebalancer:
    """Looks every PERIOD_S, and moves one request at a time."""

    def __init__(
        self, mobile: Mobile, loads: Callable[[], Sequence[WorkerLoad]], migrate_below: float, back_up_below: float
    ) -> None:
        self._mobile = mobile
        self._loads = loads
        self._migrate_below = migrate_below
        self._back_up_below = back_up_below
        self._backed_up: dict[Proposal, None] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._migrate_below or self._back_up_below:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(PERIOD_S)
            try:
                await self._look()
            except SteelyardError as error:
                log.info("a request stays where it is: %s", error.message)

    async def _look(self) -> None:
        loads, running = self._loads(), self._mobile.generating()
        move = choose_move(loads, running, self._migrate_below)
        if move is not None:
            await self._mobile.migrate(move.request_id, move.target)
            return
        here = [one.request_id for one in running]
        self._backed_up = {one: None for one in self._backed_up if one.request_id in here}
        copy = choose_move(loads, running, self._back_up_below)
        if copy is not None and copy not in self._backed_up:
            self._backed_up[copy] = None
            await self._mobile.back_up(copy.request_id, copy.target)


def choose_move(loads: Sequence[WorkerLoad], running: Sequence[Running], below: float) -> Proposal | None:
    """The longest request of the fullest decode worker with less than this share of its blocks free, and the emptiest
    worker that has room for it; None if nobody is so full, or nobody has the room."""
    decode = [load for load in loads if load.connected and load.member.role is Role.DECODE and load.stats.num_blocks]
    for source in sorted(decode, key=_free_share):
        if _free_share(source) >= below:
            return None
        mine = [one for one in running if one.worker.name == source.name]
        targets = [one for one in decode if one is not source and one.member.cohort == source.member.cohort]
        total = sum(one.num_tokens for one in mine)
        used = source.stats.num_blocks - source.stats.num_free_blocks
        for one in sorted(mine, key=lambda one: (-one.num_tokens, one.request_id)):
            needed = used * one.num_tokens / total
            for target in sorted(targets, key=_free_share, reverse=True):
                left = target.stats.num_free_blocks - needed
                if left >= MARGIN * below * target.stats.num_blocks:
                    return Proposal(one.request_id, target.member)
    return None


def _free_share(load: WorkerLoad) -> float:
    return load.stats.num_free_blocks / load.stats.num_blocks
