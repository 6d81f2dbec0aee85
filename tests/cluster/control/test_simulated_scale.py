"""Simulated workers that come and leave under way: no request fails, and tokens are what they would have been."""

from __future__ import annotations

import asyncio
from functools import cache

import pytest

from cluster.config import ClusterConfig
from cluster.simulator.fleet import SimulatedFleet
from cluster.simulator.log import EventLog
from cluster.simulator.play import simulate
from cluster.simulator.results import SimulationResult
from cluster.simulator.spec import WorldSpec
from cluster.simulator.workloads.load import load_workload
from cluster.simulator.world import World
from engine.types import Role
from tests.cluster.control.test_simulated_flips import STEPS, many, serve
from tests.cluster.test_simulator import config, play


@pytest.mark.parametrize("limit_s", [30.0, 0.0])
@pytest.mark.parametrize("worker_id", ["decode-1", "prefill-1"])
def test_a_worker_that_leaves_takes_no_token_along(worker_id: str, limit_s: float) -> None:
    """Whether it has the time to serve what it has, or not."""
    spec = WorldSpec(seed=1, config=config(2, 2, num_blocks=600), steps=STEPS, start_s=0.3)
    asked = many(14)

    async def scenario(world: World) -> None:
        fleet = SimulatedFleet(world)
        serving = asyncio.get_running_loop().create_task(serve(world, asked, 0.02))
        await asyncio.sleep(0.15)
        member = fleet.listed(worker_id)
        assert member is not None
        fleet.remove(worker_id, "another life", limit_s)
        fleet.remove(worker_id, member.incarnation, limit_s)
        assert member.worker_id not in {one.worker_id for one in fleet.members()}
        assert await serving == [spec.weights.continuation(one) for one in asked]
        await asyncio.sleep(1.0)
        assert fleet.listed(worker_id) is None
        assert world.worker(worker_id) is None
        assert fleet.add(Role.DECODE) == ("decode-1" if worker_id == "decode-1" else "decode-2")
        assert len(fleet.coming()) == 1
        await asyncio.sleep(0.5)
        assert (fleet.coming(), len(fleet.members())) == ([], 4)
        retried = dict(world.dispatcher.retries)
        assert not (retried and limit_s), "with time, nothing has to be placed again"

    play(spec, scenario)


@cache
def day(most: int, seed: int = 1) -> SimulationResult:
    """Two minutes of little to do, three of much, five of little."""
    settings = {
        "engine": {"num_blocks": 4096, "max_batch_tokens": 2048, "prefill_chunk": 1024, "max_batch_seqs": 64},
        "pools": {"prefill": {"workers": 1}, "decode": {"workers": 1}},
        "router": {"ttft_s": 2.0, "tpot_s": 0.03, "max_live_requests": 10**5},
        "controller": {"scale": {"max_workers": most, "add_after_s": 10.0, "remove_after_s": 40.0}},
    }
    spec = WorldSpec(
        seed, ClusterConfig.model_validate(settings), STEPS, plain=True, frame_bytes=2**25, is_controlled=True,
        max_context=32768, start_s=15.0,
    )  # fmt: skip
    return simulate(spec, load_workload("tests/cluster/control/day.yaml", seed), EventLog(keep=False, detailed=False))


def kept(result: SimulationResult) -> float:
    good = [one for one in result.requests if not one.error and (one.ttft_s or 99) <= 2.0 and (one.tpot_s or 0) <= 0.03]
    return len(good) / len(result.requests)


def test_workers_come_with_the_load_and_leave_after_it() -> None:
    scaled, fixed = day(6), day(2)
    came = [one.at_s for one in scaled.happenings if one.what.startswith("came") and one.at_s > 1]
    left = [one.at_s for one in scaled.happenings if one.what == "left"]
    assert 2 <= len(came) <= 3
    assert len(left) >= 2
    assert min(came) > 130, "the load rises at 120 s"
    assert min(left) > 300, "and falls at 300 s"
    assert kept(scaled) > kept(fixed) + 0.1
    assert {one.error for one in scaled.requests} <= {"", "overloaded"}
    assert not [one for one in fixed.happenings if one.what == "left"]
