"""Flips of simulated workers under way: the streams go on with the same tokens, and nothing is left behind."""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import cache

import pytest

from cluster.config import ClusterConfig
from cluster.control.flip import Flipped, flip
from cluster.simulator.fleet import SimulatedFleet
from cluster.simulator.log import EventLog
from cluster.simulator.play import simulate
from cluster.simulator.results import SimulationResult
from cluster.simulator.service_times.roofline import Roofline
from cluster.simulator.spec import WorldSpec
from cluster.simulator.workloads.load import load_workload
from cluster.simulator.world import World
from engine.errors import SteelyardError
from engine.types import Request, Role
from tests.cluster.test_simulator import config, play, request

STEPS = Roofline(overhead_s=0.005, weights_s=0.005, prefill_token_s=2e-4, decode_sequence_s=5e-4)


async def flipped(world: World, worker_id: str, to: Role, evacuate_s: float = 0.5) -> Flipped:
    incarnation = world.workers[worker_id].sides.member.incarnation
    return await flip(SimulatedFleet(world), worker_id, incarnation, to, evacuate_s, timeout_s=10.0)


async def serve(world: World, asked: list[Request], every_s: float) -> list[tuple[int, ...]]:
    tasks = []
    for one in asked:
        tasks.append(asyncio.get_running_loop().create_task(world.tokens_of(one)))
        await asyncio.sleep(every_s)
    return [await task for task in tasks]


def many(count: int, num_prompt: int = 90, max_tokens: int = 40) -> list[Request]:
    return [request(f"r{index}", num_prompt + 7 * index, max_tokens + index) for index in range(count)]


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize(("worker_id", "to"), [("decode-1", Role.PREFILL), ("prefill-1", Role.DECODE)])
def test_no_token_is_lost_or_changed_when_a_worker_changes_its_pool(
    worker_id: str, to: Role, prefix_cache: bool
) -> None:
    spec = WorldSpec(seed=1, config=config(2, 2, num_blocks=600, prefix_cache=prefix_cache), steps=STEPS)
    asked = many(12)

    async def scenario(world: World) -> None:
        serving = asyncio.get_running_loop().create_task(serve(world, asked, 0.02))
        await asyncio.sleep(0.15)
        done = await flipped(world, worker_id, to)
        assert (done.role, done.problem) == (to, "")
        tokens = await serving
        assert tokens == [spec.weights.continuation(one) for one in asked]
        after = many(6, num_prompt=80)
        renamed = [request(f"after-{one.request_id}", 80, 20) for one in after]
        assert await serve(world, renamed, 0.01) == [spec.weights.continuation(one) for one in renamed]
        assert world.workers[worker_id].sides.status().role is to

    play(spec, scenario)


def test_it_serves_its_new_pool_and_no_longer_the_old_one() -> None:
    spec = WorldSpec(seed=1, config=config(1, 2, num_blocks=600), steps=STEPS)

    async def scenario(world: World) -> None:
        await flipped(world, "decode-0", Role.PREFILL)
        before = world.workers["decode-0"].engine.stats().num_steps
        asked = many(8)
        assert await serve(world, asked, 0.0) == [spec.weights.continuation(one) for one in asked]
        assert world.workers["decode-0"].engine.stats().num_steps > before
        roles = Counter(load.member.role for load in world.dispatcher.loads())
        assert roles == {Role.PREFILL: 2, Role.DECODE: 1}
        assert not [load for load in world.dispatcher.loads() if load.name[0] == "decode-0" and load.decodes.ends]

    play(spec, scenario)


def test_running_sequences_move_away_and_what_cannot_move_ends_where_it_is() -> None:
    """The other decode worker has room for some of them only."""
    spec = WorldSpec(seed=1, config=config(1, 2, num_blocks=100), steps=STEPS)
    asked = [request(f"r{index}", 200, 60) for index in range(10)]

    async def scenario(world: World) -> None:
        serving = asyncio.get_running_loop().create_task(serve(world, asked, 0.01))
        await asyncio.sleep(0.6)
        done = await flipped(world, "decode-1", Role.PREFILL, evacuate_s=0.3)
        assert done.role is Role.PREFILL
        assert await serving == [spec.weights.continuation(one) for one in asked]
        assert dict(world.dispatcher.moves.counts).get("moved", 0) > 0

    play(spec, scenario)


@pytest.mark.parametrize("after_s", [0.0, 0.01, 0.05])
def test_a_worker_that_dies_in_the_middle_of_a_flip_loses_no_request(after_s: float) -> None:
    spec = WorldSpec(seed=1, config=config(2, 2, num_blocks=600), steps=STEPS)
    asked = many(10)

    async def scenario(world: World) -> None:
        serving = asyncio.get_running_loop().create_task(serve(world, asked, 0.02))
        await asyncio.sleep(0.2)
        task = asyncio.get_running_loop().create_task(flipped(world, "decode-1", Role.PREFILL))
        await asyncio.sleep(after_s)
        if "decode-1" in world.workers:
            world.kill("decode-1")
            world.unlist("decode-1")
        outcome = (await asyncio.gather(task, return_exceptions=True))[0]
        assert isinstance(outcome, SteelyardError | Flipped)
        world.add_worker(Role.DECODE, 1)
        assert await serving == [spec.weights.continuation(one) for one in asked]

    play(spec, scenario)


def test_an_order_that_is_overtaken_changes_nothing() -> None:
    spec = WorldSpec(seed=1, config=config(1, 2))

    async def scenario(world: World) -> None:
        sides = world.workers["decode-1"].sides
        sides.relabel(Role.PREFILL, 3)
        with pytest.raises(SteelyardError, match="not newer"):
            sides.relabel(Role.DECODE, 2)
        sides.relabel(Role.PREFILL, 3)
        assert (sides.member.role, sides.member.role_epoch) == (Role.PREFILL, 3)
        sides.relabel(Role.DECODE, 4)

    play(spec, scenario)


# --- with the controller --------------------------------------------------------------------------------------


@cache
def swing(mode: str, run: int = 0, seed: int = 1) -> SimulationResult:
    """A minute and a half of long prompts with short answers, then short prompts with long answers, and so on."""
    settings = {
        "engine": {"num_blocks": 4096, "max_batch_tokens": 2048, "prefill_chunk": 1024, "max_batch_seqs": 64},
        "pools": {"prefill": {"workers": 2}, "decode": {"workers": 2}},
        "router": {"ttft_s": 2.0, "tpot_s": 0.03, "max_live_requests": 10**5},
        "controller": {"mode": mode, "window_s": 20.0, "bucket_s": 2.0},
    }
    spec = WorldSpec(
        seed, ClusterConfig.model_validate(settings), STEPS, plain=True, frame_bytes=2**25, is_controlled=True,
        max_context=32768,
    )  # fmt: skip
    workload = load_workload("tests/cluster/control/swing.yaml", seed)
    return simulate(spec, workload, EventLog(keep=False, detailed=False))


def kept(result: SimulationResult) -> float:
    good = [one for one in result.requests if not one.error and (one.ttft_s or 99) <= 2.0 and (one.tpot_s or 0) <= 0.03]
    return len(good) / len(result.requests)


def test_a_load_that_swings_is_followed_and_more_targets_are_kept() -> None:
    ours, still = swing("auto"), swing("off")
    became = [one.what for one in ours.happenings if one.what.startswith("became")]
    assert len(became) >= 2
    assert {"became prefill", "became decode"} <= set(became)
    assert kept(ours) > kept(still)
    assert {one.error for one in ours.requests} <= {"", "overloaded"}


def test_two_runs_of_one_seed_flip_the_same() -> None:
    assert swing("auto") == swing("auto", run=1)


def test_who_only_watches_changes_nothing() -> None:
    assert not [one for one in swing("watch").happenings if one.what.startswith("became")]


def test_few_devices_with_targets_that_leave_slack_serve_both_phases_and_keep_more_so() -> None:
    """Two workers; prompts need more than one of them has time for."""

    def outcome(together: bool) -> SimulationResult:
        settings = {
            "engine": {"num_blocks": 4096, "max_batch_tokens": 2048, "prefill_chunk": 1024, "max_batch_seqs": 64},
            "router": {"ttft_s": 3.0, "tpot_s": 0.2, "max_live_requests": 10**5},
            "controller": {"together": together, "window_s": 20.0, "bucket_s": 2.0},
        }
        spec = WorldSpec(
            1, ClusterConfig.model_validate(settings), STEPS, plain=True, frame_bytes=2**25, is_controlled=True,
            max_context=32768,
        )  # fmt: skip
        words = "poisson:rate=2.6,seconds=120,prompt=uniform:2000:3000,output=uniform:40:80"
        return simulate(spec, load_workload(words, 1), EventLog(keep=False, detailed=False))

    def share(result: SimulationResult) -> float:
        good = [
            one for one in result.requests
            if not one.error and (one.ttft_s or 99) <= 3.0 and (one.tpot_s or 0) <= 0.2
        ]  # fmt: skip
        return len(good) / len(result.requests)

    both, apart = outcome(True), outcome(False)
    assert [one.what for one in both.happenings if one.what.startswith("became")] == ["became decode"]
    assert not [one.what for one in apart.happenings if one.what.startswith("became")]
    assert share(both) > share(apart)
