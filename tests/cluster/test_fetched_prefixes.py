"""A conversation in the simulated cluster: what decode has of the last turn is fetched back, where that is quicker than
to compute it."""

from __future__ import annotations

import pytest

from cluster.simulator.network import LinkTimes
from cluster.simulator.spec import WorldSpec
from cluster.simulator.world import World
from engine.types import Request, SamplingParams
from tests.cluster.test_migration import check, follow
from tests.cluster.test_simulator import config, play, request

NUM_PROMPT, NUM_OUTPUT = 300, 400
BLOCK = 16


def second_turn(spec: WorldSpec, first: Request) -> Request:
    return Request(
        "second", (*first.prompt_ids, *spec.weights.continuation(first), 5, 6, 7), SamplingParams(20, seed=3)
    )


@pytest.mark.parametrize(("bytes_per_s", "is_fetched"), [(1e10, True), (1e5, False)], ids=["fast link", "slow link"])
def test_the_next_turn_computes_only_what_is_new(bytes_per_s: float, is_fetched: bool) -> None:
    spec = WorldSpec(seed=1, config=config(num_blocks=320), links=LinkTimes(bytes_per_s=bytes_per_s))
    first = request(num_prompt=NUM_PROMPT, max_tokens=NUM_OUTPUT)
    second = second_turn(spec, first)

    async def nothing(_world: World, _output: object) -> None:
        return None

    async def scenario(world: World) -> None:
        check(spec, first, await follow(world, first, nothing))
        seen = await follow(world, second, nothing)
        check(spec, second, seen)
        known = NUM_PROMPT + NUM_OUTPUT - 1 if is_fetched else NUM_PROMPT
        assert seen[0].cached_tokens == known // BLOCK * BLOCK
        totals = world.workers["prefill-0"].sides.status().transfers
        assert totals.num_pulls == is_fetched
        if is_fetched:
            assert totals.saved_bytes, "the prompt of the first turn was here"

    play(spec, scenario)
