"""Migration of running sequences in the simulated cluster: the stream goes on with the same tokens."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing

import pytest

from cluster.simulator.spec import WorldSpec
from cluster.simulator.world import World
from engine.types import FinishReason, Request, TokenOutput
from router.membership import Member
from tests.cluster.test_simulator import config, play, request

LAST = 50  # later there might be no time left

Act = Callable[[World, TokenOutput], Awaitable[None]]


def member(world: World, worker_id: str) -> Member:
    return next(one.member for one in world.dispatcher.loads() if one.member.worker_id == worker_id)


def other(world: World, request_id: str) -> Member:
    """The decode worker on which the request does not run."""
    here = next(one.worker.worker_id for one in world.dispatcher.generating() if one.request_id == request_id)
    return member(world, "decode-1" if here == "decode-0" else "decode-0")


async def follow(world: World, asked: Request, act: Act) -> list[TokenOutput]:
    """All outputs; `act` is called after each, before the next is read."""
    seen: list[TokenOutput] = []
    async with aclosing(world.generate(asked)) as outputs:
        async for output in outputs:
            seen.append(output)
            await act(world, output)
    return seen


def check(spec: WorldSpec, asked: Request, seen: list[TokenOutput]) -> None:
    tokens = tuple(token for output in seen for token in output.token_ids)
    assert tokens == spec.weights.continuation(asked)
    assert seen[-1].finish is FinishReason.LENGTH


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("shift", range(10))
def test_tokens_are_the_same_after_a_migration_at_every_tenth_token(prefix_cache: bool, shift: int) -> None:
    spec = WorldSpec(seed=1, config=config(num_decode=2, prefix_cache=prefix_cache))
    asked = request(num_prompt=117, max_tokens=64)

    async def scenario(world: World) -> None:
        moved: list[str] = []

        async def act(world: World, output: TokenOutput) -> None:
            if 0 < output.first_index < LAST and output.first_index % 10 == shift:
                target = other(world, asked.request_id)
                await world.dispatcher.migrate(asked.request_id, target)
                moved.append(target.worker_id)

        seen = await follow(world, asked, act)
        check(spec, asked, seen)
        assert len(moved) >= 4
        pauses = [name for output in seen for name, _ in output.stages if name == "migration_pause"]
        assert len(pauses) == len(moved)
        assert world.dispatcher.migrations == (("moved", len(moved)),)
        for one in ("decode-0", "decode-1"):
            totals = world.workers[one].sides.status().transfers
            assert totals.num_failed == 0
            assert bool(totals.saved_bytes) == prefix_cache, "what was copied ahead does not move again"

    play(spec, scenario)
