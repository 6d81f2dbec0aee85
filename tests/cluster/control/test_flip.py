"""A flip, step by step, on a cluster whose steps fail where the test says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from cluster.control.flip import Flipped, flip
from engine.errors import Unavailable, WorkerLost
from engine.types import Role
from router.membership import Member

WORKER = Member("decode-1", "life", Role.DECODE, 4, "127.0.0.1:1", "same")


class FakeCluster:
    """One worker. `during` is done in the step of that name, instead of the step if it raises."""

    def __init__(self, **during: Callable[[FakeCluster], Awaitable[None]]) -> None:
        self.now: Member | None = WORKER
        self.worker = WORKER  # by its own word
        self.told: list[Member] = []
        self.steps: list[str] = []
        self._during = during

    def listed(self, worker_id: str) -> Member | None:
        return self.now

    def relist(self, member: Member) -> None:
        self.now = member
        self.told.append(member)

    async def evacuate(self, member: Member, limit_s: float) -> int:
        await self._step("evacuate")
        return 3

    async def relabel(self, member: Member, role: Role, role_epoch: int) -> None:
        await self._step("relabel")
        self.worker = replace(self.worker, role=role, role_epoch=role_epoch)

    async def probe(self, member: Member) -> Member:
        await self._step("probe")
        return self.worker

    async def _step(self, name: str) -> None:
        self.steps.append(name)
        if name in self._during:
            await self._during[name](self)


async def fails(_: FakeCluster) -> None:
    raise Unavailable("it does not answer")


async def hangs(_: FakeCluster) -> None:
    await asyncio.get_running_loop().create_future()


def run(cluster: FakeCluster, to: Role = Role.PREFILL, incarnation: str = "life") -> Flipped:
    return asyncio.run(flip(cluster, "decode-1", incarnation, to, evacuate_s=0.1, timeout_s=0.05))


def test_it_leaves_its_pool_is_relabelled_and_is_listed_in_the_other() -> None:
    cluster = FakeCluster()
    done = run(cluster)
    assert cluster.steps == ["evacuate", "relabel", "probe"]
    assert [(one.role, one.role_epoch, one.is_leaving) for one in cluster.told] == [
        (Role.DECODE, 4, True),
        (Role.PREFILL, 5, False),
    ]
    assert (done.role, done.num_left, done.problem) == (Role.PREFILL, 3, "")


@pytest.mark.parametrize("step", ["evacuate", "relabel", "probe"])
@pytest.mark.parametrize("fault", [fails, hangs])
def test_a_step_that_fails_or_hangs_is_undone(step: str, fault: Callable[[FakeCluster], Awaitable[None]]) -> None:
    """Whatever the worker had heard by then, it ends where it was, under an epoch that is newer than all before."""
    cluster = FakeCluster(**{step: fault})
    done = run(cluster)
    assert done.role is Role.DECODE
    assert done.problem
    assert cluster.now is not None
    assert (cluster.now.role, cluster.now.is_leaving) == (Role.DECODE, False)
    if step != "relabel":
        assert cluster.now.role_epoch == cluster.worker.role_epoch == 6
        assert cluster.worker.role is Role.DECODE


def test_a_label_that_did_not_take_is_seen() -> None:
    async def forgets(cluster: FakeCluster) -> None:
        cluster.worker = replace(cluster.worker, role=Role.DECODE)

    done = run(FakeCluster(probe=forgets))
    assert done.role is Role.DECODE
    assert "says that it is decode" in done.problem


def test_a_worker_that_dies_meanwhile_is_not_listed_again() -> None:
    async def dies(cluster: FakeCluster) -> None:
        cluster.now = None

    cluster = FakeCluster(relabel=dies)
    with pytest.raises(WorkerLost, match="ended while"):
        run(cluster)
    assert cluster.now is None


def test_the_next_life_of_a_worker_is_not_taken_for_it() -> None:
    async def returns(cluster: FakeCluster) -> None:
        cluster.now = replace(WORKER, incarnation="next", role_epoch=0)

    cluster = FakeCluster(relabel=returns)
    with pytest.raises(WorkerLost):
        run(cluster)
    assert cluster.now is not None
    assert cluster.now.incarnation == "next"
    with pytest.raises(Unavailable):
        run(FakeCluster(), incarnation="an earlier one")


def test_one_that_is_leaving_is_not_flipped_twice() -> None:
    cluster = FakeCluster()
    cluster.now = replace(WORKER, is_leaving=True)
    with pytest.raises(Unavailable):
        run(cluster)


def test_one_that_serves_that_pool_already_is_left_alone() -> None:
    cluster = FakeCluster()
    assert run(cluster, to=Role.DECODE).role is Role.DECODE
    assert not cluster.told


def test_who_is_cancelled_lists_it_as_it_was() -> None:
    cluster = FakeCluster(evacuate=hangs)

    async def scenario() -> None:
        task = asyncio.create_task(flip(cluster, "decode-1", "life", Role.PREFILL, 0.1, 60.0))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(scenario())
    assert cluster.now is not None
    assert (cluster.now.role, cluster.now.is_leaving) == (Role.DECODE, False)
    assert cluster.now.role_epoch > WORKER.role_epoch + 1, "newer than what it may have heard"
