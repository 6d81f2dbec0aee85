"""Workers of one simulated host slow each other's steps down for as long as both compute."""

from __future__ import annotations

import asyncio

import pytest

from cluster.simulator.chance import Chance
from cluster.simulator.clock import run_virtual
from cluster.simulator.host import Host, Slowdown
from cluster.simulator.spec import WorldSpec
from cluster.simulator.world import World
from engine.step_shape import Chunk, StepShape, decode_shape
from engine.types import Role
from tests.cluster.test_simulator import config, play, request

DECODE, PREFILL = decode_shape([100]), StepShape((Chunk(0, 128),))
SLOWDOWN = Slowdown(prefill=1.5, decode=2.0)


async def timed(host: Host, shape: StepShape, alone_s: float, after_s: float = 0.0) -> tuple[float, float]:
    """When the step ended, and how long it says that it took."""
    await asyncio.sleep(after_s)
    took_s = await host.compute(shape, alone_s)
    return asyncio.get_running_loop().time(), took_s


def test_a_step_alone_takes_what_it_takes() -> None:
    async def main() -> None:
        host = Host(SLOWDOWN)
        assert await timed(host, DECODE, 0.25) == (0.25, 0.25)
        assert await timed(host, PREFILL, 0.5) == (0.75, 0.5)

    run_virtual(main())


def test_two_steps_slow_each_other_down_while_they_overlap() -> None:
    """Decode does half of its second alone, and the rest at half the pace: to 1.5. By then prefill has done 2/3 of its
    own, and does the last third alone."""

    async def main() -> None:
        host = Host(SLOWDOWN)
        both = await asyncio.gather(timed(host, DECODE, 1.0), timed(host, PREFILL, 1.0, after_s=0.5))
        assert both == [pytest.approx((1.5, 1.5)), pytest.approx((11 / 6, 4 / 3))]

    run_virtual(main())


def test_each_further_one_adds_as_much() -> None:
    async def main() -> None:
        host = Host(Slowdown(decode=1.25))
        three = await asyncio.gather(*(timed(host, DECODE, 1.0) for _ in range(3)))
        assert three == [pytest.approx((1.5, 1.5))] * 3

    run_virtual(main())


def test_a_step_that_is_given_up_slows_nobody_down_any_more() -> None:
    async def main() -> None:
        host = Host(SLOWDOWN)
        given_up = asyncio.create_task(host.compute(PREFILL, 10.0))
        asyncio.get_running_loop().call_later(1.0, given_up.cancel)
        assert await timed(host, DECODE, 1.0) == pytest.approx((1.5, 1.5))
        await asyncio.gather(given_up, return_exceptions=True)

    run_virtual(main())


@pytest.mark.parametrize("seed", range(5))
def test_whatever_overlaps_a_step_takes_between_its_time_alone_and_that_in_full_company(seed: int) -> None:
    chance, slowdown = Chance(seed), Slowdown(1.3, 1.7)

    async def main() -> None:
        host, alone = Host(slowdown), [chance.exponential(1.0) for _ in range(60)]
        shapes = [(DECODE, PREFILL)[chance.below(2)] for _ in alone]
        starts = [chance.unit() * 20 for _ in alone]
        ends = await asyncio.gather(*map(timed, [host] * 60, shapes, alone, starts))
        for (ended, took_s), shape, alone_s, start in zip(ends, shapes, alone, starts, strict=True):
            assert ended - start == pytest.approx(took_s)
            assert 1 - 1e-9 <= took_s / alone_s <= slowdown.of(shape, 59) + 1e-9

    run_virtual(main())


def test_in_a_world_of_one_host_tokens_are_the_same_and_steps_that_meet_take_longer() -> None:
    spec = WorldSpec(seed=3, config=config(), slowdown=Slowdown(prefill=2.0, decode=3.0))

    async def scenario(world: World) -> None:
        asked = [request(f"r{number}", 200, 20) for number in range(4)]
        tokens = await asyncio.gather(*map(world.tokens_of, asked))
        assert tokens == [spec.weights.continuation(one) for one in asked]
        steps = world.dispatcher.step_history.since(0).steps
        for role, factor in ((Role.PREFILL, 2.0), (Role.DECODE, 3.0)):
            ratios = [one.record.step_s / spec.steps.step_s(one.record.shape) for one in steps if one.role is role]
            assert min(ratios) == pytest.approx(1.0)
            assert 1.01 < max(ratios) <= factor + 1e-9

    play(spec, scenario)
