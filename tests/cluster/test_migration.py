"""Migration of running sequences in the simulated cluster: the stream goes on with the same tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing

import pytest

from cluster.simulator.spec import WorldSpec
from cluster.simulator.world import World
from engine.errors import InvalidRequest, Overloaded, SteelyardError
from engine.types import FinishReason, Request, Role, TokenOutput
from router.membership import Member
from tests.cluster.test_simulator import config, play, request

LAST = 50  # later there might be no time left

Act = Callable[[World, TokenOutput], Awaitable[None]]


def member(world: World, worker_id: str) -> Member:
    return next(one.member for one in world.dispatcher.loads() if one.member.worker_id == worker_id)


def other(world: World, request_id: str) -> Member:
    """The decode worker on which the request does not run."""
    here = next(one.worker.worker_id for one in world.dispatcher.moves.generating() if one.request_id == request_id)
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
                await world.dispatcher.moves.migrate(asked.request_id, target)
                moved.append(target.worker_id)

        seen = await follow(world, asked, act)
        check(spec, asked, seen)
        assert len(moved) >= 4
        pauses = [name for output in seen for name, _ in output.stages if name == "migration_pause"]
        assert len(pauses) == len(moved)
        assert world.dispatcher.moves.counts == (("moved", len(moved)),)
        for one in ("decode-0", "decode-1"):
            totals = world.workers[one].sides.status().transfers
            assert totals.num_failed == 0
            assert bool(totals.saved_bytes) == prefix_cache, "what was copied ahead does not move again"

    play(spec, scenario)


# --- when it goes wrong -------------------------------------------------------------------------------------------


async def failing(world: World, asked: Request, hurt: Callable[[World], None], after: int = 20) -> list[TokenOutput]:
    """Its outputs, with a move in the background that is hurt as soon as it has begun."""
    moves: list[asyncio.Task[None]] = []

    async def act(world: World, output: TokenOutput) -> None:
        if output.first_index == after:
            moving = world.dispatcher.moves.migrate(asked.request_id, other(world, asked.request_id))
            moves.append(asyncio.get_running_loop().create_task(moving))
            await asyncio.sleep(0.002)
            hurt(world)

    seen = await follow(world, asked, act)
    await asyncio.gather(*moves, return_exceptions=True)
    return seen


@pytest.mark.parametrize("victim", ["decode-0", "decode-1", "both ends of the move"])
def test_workers_that_die_while_a_request_moves_cost_no_token(victim: str) -> None:
    spec = WorldSpec(seed=1, config=config(num_decode=2))
    asked = request(num_prompt=117, max_tokens=64)

    async def scenario(world: World) -> None:
        def hurt(world: World) -> None:
            for one in ("decode-0", "decode-1"):
                if victim in (one, "both ends of the move"):
                    world.kill(one)
            if victim == "both ends of the move":
                world.add_worker(Role.DECODE, 2)

        check(spec, asked, await failing(world, asked, hurt))

    play(spec, scenario)


def test_without_room_at_the_target_it_stays() -> None:
    spec = WorldSpec(seed=1, config=config(num_decode=2, num_blocks=24))
    asked, big = request(num_prompt=117, max_tokens=64), request("big", num_prompt=300, max_tokens=60)

    async def scenario(world: World) -> None:
        filling = asyncio.get_running_loop().create_task(world.tokens_of(big))  # least work: it goes to the other one
        refused: list[str] = []

        async def act(world: World, output: TokenOutput) -> None:
            if output.first_index in (10, 20):
                with pytest.raises(Overloaded) as caught:
                    await world.dispatcher.moves.migrate(asked.request_id, other(world, asked.request_id))
                refused.append(caught.value.code)

        check(spec, asked, await follow(world, asked, act))
        assert refused == ["overloaded"] * 2
        assert world.dispatcher.moves.counts == (("overloaded", 2),)
        await filling

    play(spec, scenario)


def test_a_client_that_leaves_takes_both_ends_along() -> None:
    spec = WorldSpec(seed=1, config=config(num_decode=2))
    asked = request(num_prompt=117, max_tokens=64)

    async def scenario(world: World) -> None:
        moves: list[asyncio.Task[None]] = []
        async with aclosing(world.generate(asked)) as outputs:
            async for output in outputs:
                if output.first_index == 20:
                    moving = world.dispatcher.moves.migrate(asked.request_id, other(world, asked.request_id))
                    moves.append(asyncio.get_running_loop().create_task(moving))
                    await asyncio.sleep(0.002)
                    break
        (move,) = moves
        with pytest.raises(SteelyardError):
            await move

    play(spec, scenario)  # and sees that nothing is left


def test_what_does_not_generate_cannot_move() -> None:
    spec = WorldSpec(seed=1, config=config(num_decode=2))
    asked = request(num_prompt=117, max_tokens=8)

    async def scenario(world: World) -> None:
        with pytest.raises(InvalidRequest):
            await world.dispatcher.moves.migrate(asked.request_id, member(world, "decode-1"))

        async def act(world: World, output: TokenOutput) -> None:
            if output.first_index == 0:
                with pytest.raises(InvalidRequest):
                    await world.dispatcher.moves.migrate(asked.request_id, member(world, "decode-1"))

        check(spec, asked, await follow(world, asked, act))

    play(spec, scenario)


def test_a_full_worker_gives_requests_away() -> None:
    """Two long answers on one decode worker, which is short of blocks, and a second one that comes later."""
    small = config(num_decode=1, num_blocks=36)
    router = small.router.model_copy(update={"migrate_below": 0.3})
    spec = WorldSpec(seed=1, config=small.model_copy(update={"router": router}))
    asked = [request(name, num_prompt=120, max_tokens=110) for name in ("one", "two")]

    async def scenario(world: World) -> None:
        running = [asyncio.get_running_loop().create_task(world.tokens_of(one)) for one in asked]
        await asyncio.sleep(0.1)
        world.add_worker(Role.DECODE, 1)
        for one, task in zip(asked, running, strict=True):
            assert await task == spec.weights.continuation(one)
        assert dict(world.dispatcher.moves.counts).get("moved", 0) >= 1

    play(spec, scenario)
