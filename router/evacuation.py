"""Evacuation: what generates on a worker that leaves its pool goes on elsewhere, while its streams go on.

1. the shortest first, several at a time, each to the decode worker with the most room for it;
2. what is about to end stays, and so does what nobody has room for: the worker serves it to its end;
3. what cannot move now is tried again once, for a move fails when its request is between two phases.
It returns when nothing is left to move, or when its time is up: then what is under way is finished, nothing is broken
off.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from engine.errors import SteelyardError
from engine.types import Role
from router.membership import Member
from router.policies.snapshot import Name, WorkerLoad
from router.rebalance import Mobile, Running

PARALLEL = 4  # moves at a time: more share one link and make every pause longer
KEPT_FREE = 0.1  # of a target's blocks
MOST_TRIES = 2
AGAIN_S = 0.02  # then one that could not move is tried again

log = logging.getLogger(__name__)


class Evacuation:
    """Of one worker. `loads` are those of now; `is_short`: not worth a move."""

    def __init__(
        self, mobile: Mobile, loads: Callable[[], Sequence[WorkerLoad]], source: Name,
        is_short: Callable[[str], bool] = lambda _request_id: False,
    ) -> None:  # fmt: skip
        self._mobile = mobile
        self._loads = loads
        self._source = source
        self._is_short = is_short
        self._tries: dict[str, int] = {}
        self.tasks: list[asyncio.Future[None]] = []  # they may outlive the time
        self._promised: dict[Name, int] = {}  # tokens that are on their way to a target

    async def run(self, limit_s: float) -> int:
        """How many are still there when it returns, within about this time."""
        deadline = asyncio.get_running_loop().time() + limit_s
        self.tasks = [asyncio.ensure_future(self._move_on(deadline)) for _ in range(PARALLEL)]
        for task in self.tasks:
            task.add_done_callback(_heard)
        await asyncio.wait(self.tasks, timeout=limit_s)
        return len(self._here()) + sum(not task.done() for task in self.tasks)

    def _here(self) -> list[Running]:
        return [one for one in self._mobile.generating() if one.worker.name == self._source]

    async def _move_on(self, deadline: float) -> None:
        loop = asyncio.get_running_loop()
        while loop.time() < deadline and (chosen := self._next()) is not None:
            running, target = chosen
            self._promised[target.name] = self._promised.get(target.name, 0) + running.num_tokens
            try:
                await self._mobile.migrate(running.request_id, target)
            except SteelyardError as error:
                log.info("a request stays where it is for now: %s", error.message)
                await asyncio.sleep(AGAIN_S)
            finally:
                self._promised[target.name] -= running.num_tokens

    def _next(self) -> tuple[Running, Member] | None:
        for one in sorted(self._here(), key=lambda one: (one.num_tokens, one.request_id)):
            if self._tries.get(one.request_id, 0) >= MOST_TRIES or self._is_short(one.request_id):
                continue
            target = roomiest(self._loads(), one, self._promised)
            if target is not None:
                self._tries[one.request_id] = self._tries.get(one.request_id, 0) + 1
                return one, target
        return None


def roomiest(loads: Sequence[WorkerLoad], running: Running, promised: dict[Name, int]) -> Member | None:
    """The decode worker that has the most room for it, beside what is on its way there; None: nobody has enough."""
    source = next((load for load in loads if load.name == running.worker.name), None)
    used = source.stats.num_blocks - source.stats.num_free_blocks if source is not None else 0
    tokens = max(1.0, source.decodes.tokens[0] if source is not None else 1.0)
    block_share = used / tokens  # blocks that a token takes, others' included
    best: tuple[float, str, Member] | None = None
    for load in loads:
        member = load.member
        if member.role is not Role.DECODE or not load.connected or load.name == running.worker.name:
            continue
        if member.cohort != running.worker.cohort or not load.stats.num_blocks:
            continue
        taken = block_share * (running.num_tokens + promised.get(load.name, 0))
        left = (load.stats.num_free_blocks - taken) / load.stats.num_blocks
        if left >= KEPT_FREE and (best is None or (-left, member.worker_id) < best[:2]):
            best = -left, member.worker_id, member
    return best[2] if best is not None else None


def _heard(task: asyncio.Future[None]) -> None:
    """A move that outlives the time is finished; an error that nobody awaits is told."""
    if not task.cancelled() and task.exception() is not None:
        log.warning("an evacuation failed: %s", task.exception())
