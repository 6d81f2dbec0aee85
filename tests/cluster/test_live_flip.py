"""Flips in a running cluster: real engines, gRPC, the real Fleet over slots. Streams go on with the tokens that they
would have had anyway, whichever pool their workers serve meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.control.flip import Flipped, flip
from cluster.slot import Slot
from cluster.spec import UnitState
from cluster.supervised_fleet import SupervisedFleet
from cluster.worker import Worker
from engine.types import Request, Role, SamplingParams
from router.api import ControlView
from router.membership import Member
from router.policies.snapshot import Name
from router.report import GatewayReport
from tests.cluster.harness import LocalCluster, local_cluster
from tests.cluster.tiny_model import write_tiny_model

NUM_TOKENS = 120
SAMPLING = SamplingParams(max_tokens=NUM_TOKENS, temperature=1.0, seed=7, ignore_eos=True, repetition_penalty=1.1)
ASKED = Request("asked", tuple(7 + token % 90 for token in range(45)), SAMPLING)


@dataclass
class WorkerHere:
    """A worker of this process as the supervisor sees one. Implements cluster.spawner.WorkerProcess as far as asked."""

    worker: Worker
    incarnation: str

    async def relabel(self, role: Role, role_epoch: int) -> None:
        await self.worker.relabel(role, role_epoch)

    async def member(self) -> Member:
        return await self.worker.member()


@dataclass
class GatewayHere:
    cluster: LocalCluster
    incarnation: str = "g"

    async def report(self, control: ControlView) -> GatewayReport:
        return self.cluster.gateway.report(control)

    async def evacuate(self, worker: Name, limit_s: float) -> int:
        return await self.cluster.gateway.evacuate(worker, limit_s)


class NoStaff:
    """Nobody comes or leaves here. Implements cluster.supervised_fleet.Staff."""

    def add_worker(self, role: Role) -> str:
        raise NotImplementedError

    def remove_worker(self, worker_id: str, incarnation: str, limit_s: float) -> None:
        raise NotImplementedError


@asynccontextmanager
async def flippable(folder: Path, **overrides: object) -> AsyncIterator[tuple[LocalCluster, SupervisedFleet]]:
    """Two workers of each pool."""
    settings = {
        "model.name": str(write_tiny_model(folder / "model")), "engine.block_size": 8, "router.canary_s": 600.0,
        "engine.runner": "thread",
    }  # fmt: skip
    async with local_cluster(settings | overrides, num_prefill=2, num_decode=2) as cluster:
        workers = [
            Slot(name, UnitState.RUNNING, WorkerHere(worker, cluster.members[name].incarnation), cluster.members[name])  # type: ignore[arg-type]
            for name, worker in cluster.workers.items()
        ]

        def publish() -> None:
            cluster.members = {slot.name: slot.member for slot in workers if slot.member is not None}
            cluster.publish()

        gateways = [Slot("gateway-0", UnitState.RUNNING, GatewayHere(cluster))]  # type: ignore[arg-type]
        yield cluster, SupervisedFleet(workers, gateways, publish, NoStaff())


async def flipped(fleet: SupervisedFleet, worker_id: str, to: Role) -> Flipped:
    member = fleet.listed(worker_id)
    assert member is not None
    return await flip(fleet, worker_id, member.incarnation, to, evacuate_s=0.5, timeout_s=10.0)


async def answer(cluster: LocalCluster, request: Request) -> tuple[int, ...]:
    tokens: list[int] = []
    async with aclosing(cluster.dispatcher.generate(request)) as outputs:
        async for output in outputs:
            tokens += output.token_ids
    return tuple(tokens)


async def test_streams_go_on_with_the_same_tokens_while_workers_change_their_pools(tmp_path: Path) -> None:
    """Every worker goes to the other pool and back, one after the other, under streams that never cease."""
    async with flippable(tmp_path) as (cluster, fleet):
        wanted = await answer(cluster, replace(ASKED, request_id="alone"))
        answers: list[tuple[int, ...]] = []
        over = asyncio.Event()

        async def ask_on(name: str) -> None:
            number = 0
            while not over.is_set():
                answers.append(await answer(cluster, replace(ASKED, request_id=f"{name}-{number}")))
                number += 1

        asking = [asyncio.create_task(ask_on(name)) for name in ("a", "b", "c", "d")]
        done: list[Flipped] = []
        for worker_id, home in (("decode-1", Role.DECODE), ("prefill-1", Role.PREFILL), ("decode-0", Role.DECODE)):
            away = Role.PREFILL if home is Role.DECODE else Role.DECODE
            for to in (away, home):
                await asyncio.sleep(0.1)
                done.append(await flipped(fleet, worker_id, to))
                assert fleet.listed(worker_id) == await cluster.workers[worker_id].member()
        over.set()
        await asyncio.gather(*asking)
        assert [one.problem for one in done] == [""] * 6
        assert len(answers) >= 4
        assert set(answers) == {wanted}
        assert sorted(member.role_epoch for member in fleet.members()) == [0, 2, 2, 2]
        await asyncio.sleep(0.5)
        for worker in cluster.workers.values():
            stats = worker._sides.status().stats
            assert (stats.num_leaked_blocks, stats.num_held, stats.num_running) == (0, 0, 0)


async def test_gateways_report_what_came_and_how_it_fared(tmp_path: Path) -> None:
    async with flippable(tmp_path) as (cluster, fleet):
        view = ControlView("auto", "hold: as a test says", num_flips=3)
        await fleet.reports(view)
        service = replace(ASKED.service, ttft_s=30.0, tpot_s=5.0)
        await answer(cluster, replace(ASKED, request_id="one", service=service))
        (report,) = await fleet.reports(view)
        (came,), (fared,) = report.arrived, report.fared
        assert (came.num_prompt, came.ttft_s, came.tpot_s) == (45, 30.0, 5.0)
        assert came.compute_s > 0
        assert (fared.refused, fared.ttft_kept, fared.tpot_kept) == ("", True, True)
        roles = sorted(worker.role for worker in report.workers)
        assert roles == [Role.DECODE, Role.DECODE, Role.PREFILL, Role.PREFILL]
        assert all(step_s > 0 for _, table in report.steps for row in table.step_s for step_s in row)
        assert cluster.dispatcher.health().control == view
        (again,) = await fleet.reports(view)
        assert (again.arrived, again.fared) == ((), ())


async def test_without_a_prefill_worker_all_serve_both_phases_and_later_part_again(tmp_path: Path) -> None:
    async with flippable(tmp_path) as (cluster, fleet):
        wanted = await answer(cluster, replace(ASKED, request_id="before"))
        under_way = asyncio.create_task(answer(cluster, replace(ASKED, request_id="under-way")))
        await asyncio.sleep(0.05)
        done = [await flipped(fleet, worker_id, Role.DECODE) for worker_id in ("prefill-0", "prefill-1")]
        assert [one.problem for one in done] == ["", ""]
        service = replace(ASKED.service, ttft_s=30.0, tpot_s=5.0)
        asked = [replace(ASKED, request_id=f"r{index}", service=service) for index in range(6)]
        assert await asyncio.gather(under_way, *(answer(cluster, one) for one in asked)) == [wanted] * 7
        assert {member.role for member in fleet.members()} == {Role.DECODE}
        proved = cluster.dispatcher.canary._proved_at
        await answer(cluster, replace(ASKED, request_id="no-proof"))
        assert cluster.dispatcher.canary._proved_at == proved, "a pool might be gone"
        await fleet.reports(ControlView("auto", "as it is meant", is_together=True))
        await answer(cluster, replace(ASKED, request_id="proof"))
        assert cluster.dispatcher.canary._proved_at != proved
        moved = sum(worker._sides.status().transfers.num_pulls for worker in cluster.workers.values())
        assert (await flipped(fleet, "prefill-0", Role.PREFILL)).role is Role.PREFILL
        assert await answer(cluster, replace(ASKED, request_id="after", namespace="another")) == wanted
        assert sum(worker._sides.status().transfers.num_pulls for worker in cluster.workers.values()) >= moved
