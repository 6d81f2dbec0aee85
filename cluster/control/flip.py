"""A flip: one live worker leaves its pool and serves the other one, with its weights, its KV pool and its streams.

1. unlist: neither pool routes to it any more; what it has goes on;
2. evacuate: what generates on it goes on elsewhere, as far as that is quick. The rest ends where it is, beside its new
   work, and what was lent out stays readable until it is released: every worker holds both sides ready;
3. relabel: it gets its new role and a role epoch one up, so that it refuses what was sent by its old role;
4. probe: the worker itself says what it is now;
5. list it again.
Every step is bounded, and so is the whole. Whatever goes wrong, it gets its old role back under yet a higher epoch and
is listed as it was; where even that fails, its own supervision replaces it.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol

from engine.errors import SteelyardError, Unavailable, WorkerLost
from engine.types import Role
from router.membership import Member

BACK_S = 5.0  # for the way back

log = logging.getLogger(__name__)


class Flippable(Protocol):
    """The cluster, as far as a flip changes it. Errors are SteelyardError."""

    def listed(self, worker_id: str) -> Member | None:
        """As it is listed now."""
        ...

    def relist(self, member: Member) -> None:
        """Everybody routes by this from now on."""
        ...

    async def evacuate(self, member: Member, limit_s: float) -> int:
        """How many requests are still placed there, for either phase, after about this time at most."""
        ...

    async def relabel(self, member: Member, role: Role, role_epoch: int) -> None: ...

    async def probe(self, member: Member) -> Member:
        """The worker's own word on what it is."""
        ...


@dataclass(frozen=True, slots=True)
class Flipped:
    """What came of it. `listed_s`: from the decision until it was listed again; `num_left`: requests that it kept."""

    worker_id: str
    role: Role  # it has now
    listed_s: float
    num_left: int
    problem: str = ""  # why it did not take


async def flip(
    cluster: Flippable, worker_id: str, incarnation: str, to: Role, evacuate_s: float, timeout_s: float
) -> Flipped:  # fmt: skip
    """Raises Unavailable if this life of the worker is not listed, and WorkerLost if it ends meanwhile."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    before = cluster.listed(worker_id)
    if before is None or before.incarnation != incarnation or before.is_leaving:
        raise Unavailable(f"{worker_id} is not there to be flipped")
    if before.role is to:
        return Flipped(worker_id, to, 0.0, 0)
    cluster.relist(replace(before, is_leaving=True))
    try:
        async with asyncio.timeout(timeout_s):
            num_left = await cluster.evacuate(before, evacuate_s)
            await cluster.relabel(before, to, before.role_epoch + 1)
            after = await cluster.probe(before)
            if (after.role, after.role_epoch, after.incarnation) != (to, before.role_epoch + 1, incarnation):
                raise Unavailable(f"{worker_id} says that it is {after.role} of epoch {after.role_epoch}")
    except (SteelyardError, TimeoutError) as error:
        problem = str(error) or f"it took longer than {timeout_s:g} s"
        await _back(cluster, before)
        return Flipped(worker_id, before.role, loop.time() - begun, 0, problem)
    except BaseException:  # whoever waits is gone, or the fault is ours: no time for its answer
        with suppress(WorkerLost):
            _relist(cluster, _as_before(before))
        raise
    _relist(cluster, after)
    return Flipped(worker_id, to, loop.time() - begun, num_left)


async def _back(cluster: Flippable, before: Member) -> None:
    """To its old role, whether it had heard of the new one or not."""
    member = _as_before(before)
    try:
        async with asyncio.timeout(BACK_S):
            await cluster.relabel(before, before.role, member.role_epoch)
    except (SteelyardError, TimeoutError) as error:
        log.warning("%s does not answer, and is listed as it was: %s", before.worker_id, error)
    finally:
        _relist(cluster, member)


def _as_before(before: Member) -> Member:
    """Two epochs up: a worker takes what comes under a newer epoch than its own, and refuses what is older."""
    return replace(before, role_epoch=before.role_epoch + 2)


def _relist(cluster: Flippable, member: Member) -> None:
    """Unless this life of it is over: then its slot has unlisted it. Raises WorkerLost."""
    now = cluster.listed(member.worker_id)
    if now is None or now.incarnation != member.incarnation:
        raise WorkerLost(f"{member.worker_id} ended while it was flipped")
    cluster.relist(replace(member, is_leaving=False))
