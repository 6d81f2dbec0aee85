"""Several answers to one prompt through the simulated cluster: one prefill, one transfer, and each its own tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing

import pytest

from cluster.simulator.chance import Chance
from cluster.simulator.spec import WorldSpec
from cluster.simulator.world import World
from engine.errors import SteelyardError
from engine.types import FinishReason, Key, Request, Role
from tests.cluster.test_simulator import config, lines, play, request, serving


def answers(asked: Request, num: int) -> list[Request]:
    name = asked.request_id
    return [asked, *(asked.sibling(Key(f"{name}.{choice}", 0), choice) for choice in range(1, num))]


async def read(
    world: World, requests: list[Request], act: Callable[[dict[str, list[int]]], bool | None] = lambda _: None
) -> dict[str, list[int]]:
    """The tokens of each. `act` sees them after every output; True from it leaves."""
    tokens: dict[str, list[int]] = {one.request_id: [] for one in requests}
    async with aclosing(world.generate(*requests)) as outputs:
        async for output in outputs:
            known = tokens[output.key.request_id]
            assert output.first_index == len(known) or output.finish is FinishReason.ABORT
            known += output.token_ids
            if act(tokens):
                break
    return tokens


def expected(spec: WorldSpec, requests: list[Request]) -> dict[str, list[int]]:
    return {one.request_id: [*spec.weights.continuation(one)] for one in requests}


@pytest.mark.parametrize(("num_prompt", "pools"), [(300, (1, 1)), (64, (2, 2)), (5, (1, 0)), (77, (0, 1))], ids=str)
def test_each_answer_has_its_own_tokens_and_the_prompt_moves_once(num_prompt: int, pools: tuple[int, int]) -> None:
    spec = WorldSpec(seed=1, config=config())
    asked = answers(request(num_prompt=num_prompt), 5)

    async def scenario(world: World) -> None:
        for role, size in zip(("prefill", "decode"), pools, strict=True):
            for index in range(1, size):
                world.add_worker(Role(role), index)
            if not size:
                world.kill(f"{role}-0")
                world.unlist(f"{role}-0")
        await asyncio.sleep(1)
        assert await read(world, asked) == expected(spec, asked)
        pulls = [worker.sides.status().transfers.num_pulls for worker in world.workers.values()]
        assert sum(pulls) == (1 if all(pools) else 0)
        prefilled = [worker.engine.stats().prefix_queries for worker in world.workers.values()]
        assert sum(prefilled) == num_prompt, "the prompt is computed once"

    log = play(spec, scenario)
    assert len(lines(log, "submit")) == 1
    assert len({line.split("token=")[1] for line in lines(log, "gateway-0 token ", "index=19")}) > 1, (
        "the answers differ"
    )


def test_answers_that_end_at_once_leave_the_others_to_go_on() -> None:
    spec = WorldSpec(seed=3, config=config(), eos_every=4)
    named_by_one_that_ended = 0

    async def scenario(world: World) -> None:
        nonlocal named_by_one_that_ended
        for index in range(30):
            asked = answers(request(f"r{index}", 40 + index, 12), 6)
            tokens = await read(world, asked)
            assert tokens == expected(spec, asked)
            lengths = [len(tokens[one.request_id]) for one in asked]
            named_by_one_that_ended += lengths[0] == 1 < max(lengths)

        totals = world.workers["decode-0"].sides.status().transfers
        assert totals.num_pulls > 20 and totals.num_failed == 0

    play(spec, scenario)
    assert named_by_one_that_ended > 2


@pytest.mark.parametrize("victim", [Role.PREFILL, Role.DECODE])
@pytest.mark.parametrize("at", [1, 4, 30])
def test_a_worker_that_dies_costs_no_answer_a_token(victim: Role, at: int) -> None:
    spec = WorldSpec(seed=10, config=config(2, 2))
    asked = answers(request(max_tokens=40), 3)

    async def scenario(world: World) -> None:
        killed = False

        def act(tokens: dict[str, list[int]]) -> None:
            nonlocal killed
            if not killed and sum(map(len, tokens.values())) >= at:
                killed = True
                names = [name for name, worker in world.workers.items() if name.startswith(victim)]
                busy = [name for name in names if world.workers[name].engine.stats().num_held_blocks]
                world.kill(serving(world, victim) if at == 30 and victim is Role.DECODE else (busy or names)[0])

        assert await read(world, asked, act) == expected(spec, asked)

    play(spec, scenario)


@pytest.mark.parametrize("seed", range(6))
def test_a_load_of_answers_with_cancellations_and_deaths_leaves_nothing_behind(seed: int) -> None:
    """A small pool, so that copies are refused and the youngest preempted; the checks are those of `play`."""
    spec = WorldSpec(seed=seed, config=config(2, 2, num_blocks=60), eos_every=15)
    num_whole = 0

    async def scenario(world: World) -> None:
        chance = Chance(seed, "answers")
        async with asyncio.TaskGroup() as group:
            for index in range(25):
                group.create_task(client(world, chance.fork(f"{index}"), f"r{index}"))
            for worker_id in ("decode-0", "prefill-1"):
                await asyncio.sleep(0.2 + 0.6 * chance.unit())
                world.kill(worker_id)
                world.add_worker(Role(worker_id.split("-")[0]), int(worker_id[-1]))

    async def client(world: World, chance: Chance, name: str) -> None:
        nonlocal num_whole
        await asyncio.sleep(1.5 * chance.unit())
        asked = answers(request(name, 1 + chance.below(120), 1 + chance.below(30)), 1 + chance.below(5))
        wanted = expected(spec, asked)
        leaves_at = chance.below(60) if chance.below(3) == 0 else 10**6
        drops_at = chance.below(20) if chance.below(3) == 0 else 10**6
        dropped: list[str] = []

        def act(tokens: dict[str, list[int]]) -> bool:
            num_tokens = sum(map(len, tokens.values()))
            if num_tokens >= drops_at and not dropped and len(asked) > 1 and all(tokens.values()):
                dropped.append(asked[chance.below(len(asked))].request_id)
                world.dispatcher.cancel(dropped[0])
            return num_tokens >= leaves_at

        try:
            tokens = await read(world, asked, act)
        except SteelyardError:
            return
        for one, found in tokens.items():
            assert found == wanted[one][: len(found)]
        is_whole = leaves_at == 10**6
        num_whole += is_whole
        assert not is_whole or all(found == wanted[one] for one, found in tokens.items() if one not in dropped)

    play(spec, scenario)
    assert num_whole > 5
