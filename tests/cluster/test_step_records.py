"""Step records from the engine to the gateway: in a simulated cluster, and over gRPC and HTTP in a real one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest
from pydantic import TypeAdapter

from cluster.simulator.spec import WorldSpec
from cluster.simulator.world import World
from engine.step_shape import Chunk, StepRecord, StepShape, decode_shape
from engine.types import Role
from router.step_history import HeardStep, StepsView
from tests.cluster.harness import local_cluster
from tests.cluster.test_simulator import config, play, request
from tests.cluster.tiny_model import write_tiny_model

PROMPT = list(range(40))


def shapes_of(role: Role, steps: tuple[HeardStep, ...]) -> list[StepShape]:
    return [step.record.shape for step in steps if step.role is role]


def test_a_simulated_gateway_hears_of_every_step_and_forgets_who_has_left() -> None:
    spec = WorldSpec(seed=1, config=config())

    async def scenario(world: World) -> None:
        history = world.dispatcher.step_history
        await world.tokens_of(request(num_prompt=200, max_tokens=3))
        await asyncio.sleep(1.5)  # the last chunks' records come with a keep-alive
        steps = history.since(0).steps
        assert shapes_of(Role.PREFILL, steps) == [StepShape((Chunk(0, 128),)), StepShape((Chunk(128, 72),))]
        assert shapes_of(Role.DECODE, steps) == [decode_shape([201]), decode_shape([202])]
        assert [step.record.step_s for step in steps] == [spec.steps.step_s(step.record.shape) for step in steps]
        world.unlist("decode-0")
        await asyncio.sleep(1.5)
        assert {step.role for step in history.since(0).steps} == {Role.PREFILL}
        assert history.since(0).last <= len(steps)

    play(spec, scenario)


def test_of_steps_that_are_advanced_together_the_last_is_told_as_if_they_were_not() -> None:
    def records(bursts: bool) -> dict[Role, list[StepRecord]]:
        told: dict[Role, list[StepRecord]] = {}

        async def scenario(world: World) -> None:
            await asyncio.gather(*(world.tokens_of(request(f"r{number}", 200, 60)) for number in range(3)))
            await asyncio.sleep(1.5)
            for step in world.dispatcher.step_history.since(0).steps:
                told.setdefault(step.role, []).append(step.record)

        play(WorldSpec(seed=2, config=config(), plain=True, bursts=bursts), scenario)
        return told

    singly, together = records(bursts=False), records(bursts=True)
    assert together[Role.PREFILL] == singly[Role.PREFILL]
    assert len(singly[Role.DECODE]) >= 59 > len(together[Role.DECODE]) > 1
    for record in together[Role.DECODE]:
        (alone,) = (one for one in singly[Role.DECODE] if one.shape == record.shape)
        assert record.step_s == pytest.approx(alone.step_s, rel=1e-9)


async def test_a_cluster_tells_each_step_once_with_its_shape_and_duration(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    overrides = {"model.name": str(model), "engine.prefill_chunk": 16, "engine.runner": "thread"}
    async with local_cluster(overrides) as cluster, httpx.AsyncClient(base_url=cluster.url) as client:
        health = (await client.get("/health")).json()
        # k and v, 2 layers, 2 heads of 8 values in float32
        assert {worker["kv_token_bytes"] for worker in health["workers"]} == {2 * 2 * 2 * 8 * 4}
        before = await read_steps(client, 0)
        assert before.steps, "the canary's"
        body = {"model": "model", "prompt": PROMPT, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        await asyncio.sleep(1.2)
        after = await read_steps(client, before.last)
        assert shapes_of(Role.PREFILL, after.steps) == [StepShape((Chunk(at, new),)) for at, new in CHUNKS]
        assert shapes_of(Role.DECODE, after.steps) == [decode_shape([context]) for context in (41, 42, 43)]
        assert all(0 < step.record.step_s < 30 for step in after.steps)
        assert (await read_steps(client, after.last)).steps == ()


CHUNKS = ((0, 16), (16, 16), (32, 8))


async def read_steps(client: httpx.AsyncClient, after: int) -> StepsView:
    return TypeAdapter(StepsView).validate_json((await client.get("/debug/steps", params={"after": after})).content)
