"""What the gateway of a simulated cluster knows of its workers' caches is what they have, through evictions, silence
and deaths; and it finds there what another worker has computed."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from cluster.simulator.spec import WorldSpec
from cluster.simulator.world import SimulatedWorker, World
from engine.errors import SteelyardError
from engine.prefix import short_names
from engine.types import Request, Role, SamplingParams
from tests.cluster.test_simulator import config, play

HEARD_S = 3.0  # longer than a keep-alive and a new connection


def prompt_of(number: int) -> tuple[int, ...]:
    """Families of prompts share their beginnings."""
    return tuple(16 + (number % 4 + index) % 900 for index in range(20 * (number % 7 + 1)))


async def ask(world: World, numbers: range) -> Counter[str]:
    async def one(number: int) -> str:
        await asyncio.sleep(0.03 * (number - numbers.start))
        request = Request(f"r{number}", prompt_of(number) * 2, SamplingParams(30, seed=number), timeout_s=30)
        try:
            await world.tokens_of(request)
        except SteelyardError as error:
            return error.code
        return "ok"

    return Counter(await asyncio.gather(*map(one, numbers)))


def has(worker: SimulatedWorker) -> set[int]:
    return set(short_names(worker.engine.blocks._block_of))


def knows(world: World, worker: SimulatedWorker) -> set[int]:
    name = (worker.sides.member.worker_id, worker.sides.member.incarnation)
    index = world.dispatcher.learnt.prefixes
    return {one for one in index._masks if index.num_cached((one,)).get(name)}


def check(world: World) -> None:
    for name, worker in world.workers.items():
        known, real = knows(world, worker), has(worker)
        assert known == real, f"{name}: {len(known - real)} are not there, {len(real - known)} are not known"


@pytest.mark.parametrize("bursts", [False, True])
def test_the_gateway_knows_exactly_what_workers_have_cached(bursts: bool) -> None:
    spec = WorldSpec(seed=5, config=config(2, 2, num_blocks=60), plain=True, bursts=bursts)

    async def scenario(world: World) -> None:
        assert (await ask(world, range(60)))["ok"] == 60
        await asyncio.sleep(HEARD_S)
        check(world)
        assert any(world.workers[name].engine.blocks.num_cached > 50 for name in world.workers), "blocks are evicted"

    play(spec, scenario)


def test_it_is_told_anew_after_silence_and_forgets_the_dead() -> None:
    spec = WorldSpec(seed=6, config=config(2, 2, num_blocks=60))

    async def scenario(world: World) -> None:
        await ask(world, range(20))
        await asyncio.sleep(HEARD_S)
        silent = world.workers["decode-0"]
        world.network.silence(silent.port)
        await asyncio.sleep(4 * HEARD_S)
        assert not knows(world, silent), "who cannot be reached has nothing"
        world.network.restore(silent.port)
        await asyncio.sleep(2 * HEARD_S)
        check(world)
        assert knows(world, silent)
        dead = world.workers["prefill-0"]
        assert knows(world, dead)
        world.kill("prefill-0")
        await asyncio.sleep(HEARD_S)
        assert not knows(world, dead)
        world.add_worker(Role.PREFILL, 0)
        await ask(world, range(20, 40))
        await asyncio.sleep(HEARD_S)
        check(world)

    play(spec, scenario)
