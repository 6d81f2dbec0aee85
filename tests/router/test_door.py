"""The door: once it closes nobody comes in, and it waits for those inside."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from engine.errors import Unavailable
from engine.types import Request, SamplingParams, TokenOutput
from router.door import Door
from tests.router.fakes import FakeGenerator, output, stall


def request(name: str = "a") -> Request:
    return Request(name, (1, 2, 3), SamplingParams(max_tokens=2))


async def answer(door: Door, name: str = "a") -> int:
    async with aclosing(door.generate(request(name))) as outputs:
        return sum([len(one.token_ids) async for one in outputs])


async def test_a_door_that_nobody_is_behind_closes_at_once() -> None:
    door = Door(FakeGenerator())
    await answer(door)
    loop = asyncio.get_running_loop()
    before = loop.time()
    assert await door.close(drain_s=1000.0) == 0
    assert loop.time() - before < 100.0


async def test_those_inside_may_end_and_nobody_comes_in_meanwhile() -> None:
    go_on = asyncio.Event()

    async def script(one: Request) -> AsyncIterator[TokenOutput]:
        yield output(one, 0, (1,))
        await go_on.wait()
        yield output(one, 1, (2,))

    generator = FakeGenerator(script)
    door = Door(generator)
    inside = asyncio.create_task(answer(door))
    await generator.started.wait()
    closing = asyncio.create_task(door.close(drain_s=60.0))
    await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="shutting down") as refused:
        await answer(door, "b")
    assert refused.value.retry_after_s
    assert (door.health().healthy, door.health().reason) == (False, "shutting down")
    assert not closing.done()
    go_on.set()
    assert await inside == 2
    assert await closing == 0
    assert len(generator.requests) == 1


async def test_who_does_not_end_in_time_is_counted() -> None:
    generator = FakeGenerator(stall(1))
    door = Door(generator)
    inside = asyncio.create_task(answer(door))
    await generator.started.wait()
    assert await door.close(drain_s=0.01) == 1
    inside.cancel()
    await asyncio.gather(inside, return_exceptions=True)
    assert generator.live == {}
    assert await door.close(drain_s=0.01) == 0


async def test_an_open_door_changes_nothing() -> None:
    generator = FakeGenerator()
    door = Door(generator)
    assert (door.new_request_id(), door.new_seed(), door.health()) == ("r1", 42, generator.view)
    assert await answer(door) == 2
    assert generator.live == {}
