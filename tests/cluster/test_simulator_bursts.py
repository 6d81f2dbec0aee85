"""Steps advanced together: the same engine, the same event log, the same results as one by one."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass, replace

from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from cluster.config import ClusterConfig
from cluster.simulator.burst import TimedOutput
from cluster.simulator.clock import run_virtual
from cluster.simulator.links import times_of
from cluster.simulator.log import EventLog
from cluster.simulator.play import simulate
from cluster.simulator.service_times.roofline import Roofline
from cluster.simulator.spec import WorldSpec
from cluster.simulator.workloads.workload import Arrival, Workload
from cluster.simulator.world import World
from engine.errors import SteelyardError
from engine.types import STANDARD, Key, Request, Role, SamplingParams, Service, TokenOutput

LIMIT_S = 3600.0
STEPS = Roofline(overhead_s=1.03e-3, weights_s=5.17e-3, context_token_s=4.3e-7)  # no two spans of it are ever equal


@dataclass(frozen=True, slots=True)
class Plan:
    """What happens: when requests come (and leave early), and when workers die and come again."""

    requests: tuple[tuple[float, int, int, float, int], ...]  # at, prompt, max_tokens, timeout, answers
    leaves: tuple[tuple[float, int], ...]  # at, number of the request
    deaths: tuple[tuple[float, Role, bool], ...]  # at, of the first worker of a role, unlisted first?
    services: tuple[Service, ...] = (STANDARD,)  # of the requests, in turn


def spec(bursts: bool, num_decode: int = 2, **engine: object) -> WorldSpec:
    small = {"num_blocks": 96, "block_size": 16, "max_batch_tokens": 256, "prefill_chunk": 128, "max_batch_seqs": 8}
    config = ClusterConfig.model_validate(
        {
            "engine": small | engine,
            "decode": {"max_pulls": 4},
            "pools": {"prefill": {"workers": 2}, "decode": {"workers": num_decode}},
        }
    )
    return WorldSpec(3, config, STEPS, plain=True, bursts=bursts)


def log_of(plan: Plan, spec: WorldSpec) -> list[str]:
    """All that happened, in an order that equal things at equal times cannot change."""
    log = EventLog()

    async def ask(world: World, number: int) -> None:
        at, num_prompt, max_tokens, timeout_s, num_answers = plan.requests[number]
        await asyncio.sleep(at)
        sampling = SamplingParams(max_tokens, seed=number, ignore_eos=True)
        prompt = tuple(16 + (7 * number + index) % 900 for index in range(num_prompt))
        service = plan.services[number % len(plan.services)]
        asked = Request(f"r{number}", prompt, sampling, timeout_s=timeout_s, service=service)
        others = [asked.sibling(Key(f"r{number}.{choice}", 0), choice) for choice in range(1, num_answers)]
        try:
            async with aclosing(world.generate(asked, *others)) as outputs:
                async for _ in outputs:
                    pass
        except SteelyardError:
            pass

    async def leave(world: World, at: float, client: asyncio.Task[None]) -> None:
        await asyncio.sleep(at)
        await world.catch_up()
        client.cancel()

    async def die(world: World, at: float, role: Role, unlisted: bool) -> None:
        await asyncio.sleep(at)
        name = f"{role}-0"
        if name not in world.workers:
            return
        await world.catch_up()
        if unlisted:
            world.unlist(name)
        world.kill(name)
        await asyncio.sleep(0.5)
        world.add_worker(role)

    async def main() -> None:
        world = World(spec, log)
        await world.start()
        loop = asyncio.get_running_loop()
        clients = [loop.create_task(ask(world, number)) for number in range(len(plan.requests))]
        acts = [loop.create_task(leave(world, at, clients[number])) for at, number in plan.leaves]
        acts += [loop.create_task(die(world, *death)) for death in plan.deaths]
        await asyncio.gather(*clients, *acts, return_exceptions=True)
        await asyncio.sleep(60)
        for worker in world.workers.values():
            assert worker.is_quiet(), worker.sides.status()
        await world.close()

    run_virtual(main(), LIMIT_S)
    return sorted(log.to_bytes().decode().splitlines())


seconds = st.floats(0.0, 3.0)
PROMISED = Service("a", ttft_s=0.3, tpot_s=0.0085)  # of 6.2 ms and more: not for all of them
plans = st.builds(
    Plan,
    st.lists(
        st.tuples(
            seconds,
            st.integers(1, 200),
            st.integers(1, 150),
            st.one_of(st.just(600.0), st.floats(0.1, 1.5)),
            st.sampled_from([1, 1, 1, 3]),
        ),
        min_size=1,
        max_size=10,
    ).map(tuple),
    st.lists(st.tuples(seconds, st.integers(0, 9)), max_size=3).map(tuple),
    st.lists(st.tuples(seconds, st.sampled_from([Role.PREFILL, Role.DECODE]), st.booleans()), max_size=2).map(tuple),
    st.sampled_from([(STANDARD,), (PROMISED, STANDARD), (PROMISED, Service("b", tpot_s=0.02), Service("c", 1))]),
)


LEAVES_WITH_THE_LAST_TOKEN = Plan(
    ((0.0, 1, 1, 600.0, 1), (0.0, 28, 76, 600.0, 3), (0.0, 1, 1, 600.0, 1)), ((0.47941683464880025, 1),), ()
)


DIES_AMONG_ITS_STEPS = Plan(((0.0, 1, 1, 600.0, 1), (0.75, 1, 42, 600.0, 1)), (), ((1.0, Role.DECODE, True),))
COMES_BACK_AS_DECODING = Plan(  # preempted alone, and found in the prefix cache: its first step back is a plain one
    (
        (1.215210301732819, 93, 74, 0.3, 1), (2.4987863877552723, 76, 125, 600.0, 1),
        (2.20637753079641, 20, 3, 600.0, 1), (1.8983894377617458, 68, 1, 600.0, 1),
        (1.512768720910878, 93, 66, 600.0, 1), (2.213362786544204, 195, 45, 0.9895200653561647, 1),
        (2.7097093672102703, 75, 1, 0.6915375576979869, 1), (0.9568535197237702, 38, 121, 600.0, 1),
        (1.3660226012592571, 200, 41, 1.260489628826412, 1), (0.3743593838786926, 176, 82, 600.0, 1),
    ),
    (),
    ((0.36116691982563986, Role.PREFILL, True), (1.858536730676842, Role.DECODE, False)),
)  # fmt: skip
PLACED_BY_CONTEXTS = Plan(  # two decode workers are as full as each other, but for tokens that bursts tell of later
    (
        (2.6062972354833347, 166, 6, 1.1001388594030246, 1), (0.42000929621880523, 47, 136, 600.0, 1),
        (0.0, 115, 66, 1.252982717355033, 1), (1.4617275272541561, 135, 67, 600.0, 1), (1.2e-07, 137, 43, 600.0, 1),
        (2.941668264643322, 90, 143, 0.7970055913126708, 1), (2.9358621057385164, 122, 119, 0.6435211962133991, 1),
        (2.523698356507867, 37, 87, 1.112490440603198, 3), (2.523698356507867, 37, 87, 1.112490440603198, 3),
        (2.2706074120111066, 138, 75, 600.0, 1),
    ),
    (),
    (),
)  # fmt: skip
NOT_SHRUNK = (Phase.explicit, Phase.reuse, Phase.generate)  # because that takes minutes


@settings(max_examples=25, deadline=None, phases=NOT_SHRUNK)
@example(plan=DIES_AMONG_ITS_STEPS, num_decode=1, num_blocks=28, prefix_cache=False)
@example(plan=LEAVES_WITH_THE_LAST_TOKEN, num_decode=1, num_blocks=28, prefix_cache=False)
@example(plan=COMES_BACK_AS_DECODING, num_decode=1, num_blocks=28, prefix_cache=True)
@example(plan=PLACED_BY_CONTEXTS, num_decode=2, num_blocks=40, prefix_cache=True)
@given(plan=plans, num_decode=st.integers(1, 2), num_blocks=st.sampled_from([28, 40, 96]), prefix_cache=st.booleans())
def test_the_event_log_is_the_same_with_and_without_bursts(
    plan: Plan, num_decode: int, num_blocks: int, prefix_cache: bool
) -> None:
    num_requests = len(plan.requests)
    plan = replace(plan, leaves=tuple((at, number) for at, number in plan.leaves if number < num_requests))
    alone, together = (
        log_of(plan, spec(bursts, num_decode, num_blocks=num_blocks, prefix_cache=prefix_cache))
        for bursts in (False, True)
    )
    assert together == alone


def test_bursts_make_far_fewer_turns_and_the_same_results() -> None:
    arrivals = tuple(Arrival(0.2 * number, 100 + number, 150) for number in range(20))
    results, num_turns = [], []
    for bursts in (False, True):
        log = EventLog(detailed=False)
        results.append(simulate(spec(bursts), Workload("w", arrivals), log))
        num_turns.append(log.num_records)
    assert results[0] == results[1]
    assert all(result.num_output == 150 for result in results[0].requests)


def test_a_token_came_when_it_came_or_with_the_one_that_it_waited_for() -> None:
    output = TimedOutput(Key("r", 0), 1, (7, 8, 9), times=(1.0, 2.0, 3.0))
    assert times_of(output, 3.0, 0.5) == [1.0, 2.0, 3.0]
    assert times_of(output, 3.0, 2.5) == [2.5, 2.5, 3.0]
    assert times_of(TokenOutput(Key("r", 0), 1, (7, 8)), 4.0, 0.5) == [4.0, 4.0]
    merged = TimedOutput(Key("r", 0), 0, (6, 7, 8, 9), times=(1.0, 2.0, 5.0))
    assert times_of(merged, 3.0, 0.5) == [3.0, 3.0, 3.0, 5.0]
