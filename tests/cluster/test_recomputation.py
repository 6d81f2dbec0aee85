"""What is computed again is counted, by what lost it. Under overload no lease ends; one whose owner is cut off does."""

from __future__ import annotations

import asyncio

from cluster.config import ClusterConfig
from cluster.simulator.log import EventLog
from cluster.simulator.play import simulate
from cluster.simulator.recomputation import PREEMPTED, Recomputation
from cluster.simulator.results import SimulationResult
from cluster.simulator.service_times.roofline import Roofline
from cluster.simulator.spec import WorldSpec
from cluster.simulator.workloads.load import load_workload
from cluster.simulator.world import World
from engine.errors import LeaseLost, Overloaded
from engine.scheduler import Scheduled
from engine.sequence import Sequence
from engine.types import Key, Request, SamplingParams

LEASE, ROOM = LeaseLost.code, Overloaded.code


def sequence(epoch: int = 0, num_prompt: int = 100, generated: tuple[int, ...] = ()) -> Sequence:
    request = Request("r", tuple(range(num_prompt)), SamplingParams(20), epoch=epoch, generated_ids=generated)
    return Sequence.from_request(request)


def compute(counts: Recomputation, one: Sequence, start: int, stop: int) -> None:
    counts.computed(Scheduled(one, start, stop - start, samples=False))


# --- counting ---------------------------------------------------------------------------------------------------


def test_chunks_of_one_placement_are_computed_once() -> None:
    counts, one = Recomputation(), sequence()
    for start in range(0, 100, 25):
        compute(counts, one, start, start + 25)
    assert (counts.num_first, counts.by_cause) == (100, ())


def test_what_a_cache_still_has_after_a_retry_is_not_counted() -> None:
    counts = Recomputation()
    compute(counts, sequence(), 0, 64)
    counts.retried(Key("r", 0), ROOM)
    compute(counts, sequence(epoch=1), 48, 100)
    assert (counts.num_first, counts.by_cause) == (100, ((ROOM, 16),))


def test_each_position_is_charged_to_what_lost_it_last() -> None:
    """The lease took 100 positions; the refusal that followed only the 32 that had been computed again by then."""
    counts = Recomputation()
    compute(counts, sequence(), 0, 100)
    counts.retried(Key("r", 0), LEASE)
    compute(counts, sequence(epoch=1), 0, 32)
    counts.retried(Key("r", 1), ROOM)
    compute(counts, sequence(epoch=2), 0, 100)
    assert (counts.num_first, counts.by_cause) == (100, ((LEASE, 32 + 68), (ROOM, 32)))


def test_a_refusal_before_anything_is_computed_again_does_not_hide_the_lease_that_ended() -> None:
    counts = Recomputation()
    compute(counts, sequence(), 0, 100)
    counts.retried(Key("r", 0), LEASE)
    counts.retried(Key("r", 1), ROOM)
    compute(counts, sequence(epoch=2), 0, 100)
    assert counts.by_cause == ((LEASE, 100),)


def test_going_back_in_the_same_placement_is_preemption_with_the_tokens_made_since() -> None:
    counts, one = Recomputation(), sequence()
    compute(counts, one, 0, 100)
    one.tokens += [7, 8, 9]
    compute(counts, one, 96, 103)
    assert (counts.num_first, counts.by_cause) == (101, ((PREEMPTED, 6),))


def test_tokens_that_the_client_has_were_computed_before() -> None:
    counts = Recomputation()
    compute(counts, sequence(), 0, 100)
    counts.retried(Key("r", 0), "worker_lost")
    compute(counts, sequence(epoch=1, generated=(7, 8, 9)), 0, 103)
    assert (counts.num_first, counts.by_cause) == (101, (("worker_lost", 102),))


# --- a cluster under more than it can take ----------------------------------------------------------------------


def played(source: str, cut_off_s: float = 0.0) -> tuple[World, SimulationResult]:
    """By two prefill and two small decode workers. For `cut_off_s` one owner of leases is reachable by nobody, from the
    first second on; a lease lives shorter than the gateway takes to notice."""
    engine = {"num_blocks": 1000, "max_batch_tokens": 2048, "prefill_chunk": 1024}
    pools = {"prefill": {"workers": 2}, "decode": {"workers": 2}}
    router = {"deadline_s": 120.0, "max_live_requests": 4096}
    transfer = {"lease_ttl_s": 1.0, "heartbeat_s": 0.4}
    config = ClusterConfig.model_validate({"engine": engine, "pools": pools, "router": router, "kv_transfer": transfer})
    steps = Roofline(prefill_token_s=2e-4, decode_sequence_s=4e-4)
    spec = WorldSpec(5, config, steps, plain=True, frame_bytes=2**27)
    workload = load_workload(source, 5)
    worlds: list[World] = []

    def start(world: World) -> None:
        worlds.append(world)
        if cut_off_s:
            loop, port = asyncio.get_running_loop(), world.workers["decode-1"].port
            loop.call_later(1.0, world.network.silence, port)
            loop.call_later(1.0 + cut_off_s, world.network.restore, port)

    result = simulate(spec, workload, EventLog(keep=False, detailed=False), on_start=start)
    return worlds[0], result


def test_at_three_times_capacity_no_lease_of_a_living_owner_ends() -> None:
    """The pair of pools serves about 8 such requests per second."""
    world, result = played("poisson:rate=24,prompt=uniform:200:800,output=uniform:300:600,seconds=15")
    assert all(request.num_output == request.num_wanted for request in result.requests if not request.error)
    again = dict(result.recomputed)
    assert again.get(LEASE, 0) == 0
    assert again[ROOM] > 0, "decode has no room for all of them"
    assert dict(world.dispatcher.retries).get(LEASE, 0) == 0
    assert max(request.ttft_s or 0.0 for request in result.requests) > 20, "far longer than a lease lives in silence"


def test_an_owner_that_is_cut_off_loses_its_leases_and_they_are_counted() -> None:
    """Prompts take longer than a lease lives in silence."""
    world, result = played("poisson:rate=3,prompt=8000,output=60,seconds=8", cut_off_s=10.0)
    assert dict(result.recomputed)[LEASE] > 0
    assert dict(world.dispatcher.retries)[LEASE] > 0
