"""The golden law with layers that leave while their step is computed, and the proof that they do."""

from __future__ import annotations

import asyncio
import re
import threading
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from engine.build import build_engine
from engine.config import EngineConfig, ModelSource
from engine.layer_groups import LayersStored
from engine.model_runner import TorchRunner
from engine.planes import CacheLayout
from engine.pool import SharedPool
from engine.scheduler import Batch
from engine.setup import plan_engine
from engine.step_runner import ThreadStepRunner
from engine.types import Add, Request, Sampled, SamplingParams
from kv_transfer.handoff import HandOff
from kv_transfer.pull import Puller
from prefill_worker.outbox import Outbox
from tests.cluster.harness import local_cluster
from tests.cluster.test_carriers import PROMPTS, carried
from tests.cluster.tiny_model import write_tiny_model
from tests.kv_transfer.fakes import PRODUCER, Link
from tests.virtual import until

TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("layers") / "model")


async def answers(model: Path, group_bytes: int) -> tuple[list[str], str]:
    """The texts of all prompts at once, greedy and sampled, and the metrics after them."""
    overrides = {
        "model.name": str(model), "kv_transfer.layer_group_bytes": group_bytes, "engine.block_size": 8,
        "engine.prefill_chunk": 32, "engine.runner": "thread",
    }  # fmt: skip
    async with local_cluster(overrides) as cluster, httpx.AsyncClient(base_url=cluster.url, timeout=60) as client:
        base = {"model": "model", "max_tokens": 12, "ignore_eos": True, "seed": 5}
        bodies = [base | {"prompt": prompt, "temperature": index % 2} for index, prompt in enumerate(PROMPTS)]
        replies = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
        transfers = cluster.workers["decode-0"]._sides.status().transfers
        assert transfers.num_pulls >= len(PROMPTS)
        assert (transfers.num_failed, transfers.num_resumes) == (0, 0)
        await asyncio.sleep(1.2)  # a keep-alive tells the last of it
        for worker in cluster.workers.values():
            stats = worker._sides.status().stats
            assert (stats.num_leaked_blocks, stats.num_held_blocks) == (0, 0)
        return [reply.json()["choices"][0]["text"] for reply in replies], (await client.get("/metrics")).text


async def test_tokens_are_those_of_whole_steps(model: Path) -> None:
    """By each carrier, from processes and several ranks: tests/cluster/test_tensor_parallel.py tells every layer."""
    (wanted, _), (found, metrics) = await answers(model, 0), await answers(model, 1)
    assert found == wanted
    check_metrics(metrics)


def check_metrics(metrics: str) -> None:
    """Each request's transfer is in the histograms, and what was hidden is no more than what came."""
    names = ("request_seconds", "exposed_seconds", "hidden_ratio")
    counts = [re.findall(rf"^steelyard_kv_transfer_{name}_count{{.*}} (\S+)$", metrics, re.M) for name in names]
    assert counts == [[f"{len(PROMPTS):.1f}"]] * len(names)
    carrier = re.findall(r'^steelyard_kv_transfer_request_seconds_count{carrier="(\w+)"', metrics, re.M)[0]
    hidden, moved = (carried(metrics, f"steelyard_kv_transfer_bytes{end}", carrier) for end in ("_hidden", ""))
    assert 0 <= hidden <= moved


# --- a step that waits for what it has told ---------------------------------------------------------------------


class Waiting:
    """A model runner whose step goes on after each layer only when this layer has arrived at the other end."""

    def __init__(self, runner: TorchRunner) -> None:
        self._runner = runner
        self.arrived = threading.Semaphore(0)

    def execute(self, batch: Batch, stored: LayersStored | None = None) -> list[Sampled]:
        assert stored is not None

        def then_wait(num_layers: int) -> None:
            stored(num_layers)
            assert self.arrived.acquire(timeout=TIMEOUT_S), f"layer {num_layers} did not arrive"

        return self._runner.execute(batch, then_wait)


async def test_layers_arrive_before_the_only_step_of_their_prompt_ends(model: Path) -> None:
    """It would never end otherwise."""
    config = EngineConfig(num_blocks=16, block_size=8)
    setup = plan_engine(ModelSource(name=str(model)), config, b"key", layer_group_bytes=1)
    request = Request("r", tuple(range(50)), SamplingParams(max_tokens=4, temperature=0.0))
    source, target = (SharedPool(setup.layout, 16) for _ in range(2))
    built = build_engine(setup, source)
    waiting, ended = Waiting(built.runner), list[object]()
    outbox = Outbox(setup.layout, source, 2**20, TIMEOUT_S, lambda: "secret", ended.append)
    lease = outbox.grant(request.key, PRODUCER)
    target_ids = tuple(range(15, 8, -1))
    pull = asyncio.ensure_future(Puller(setup.layout, target, target_ids, Link(outbox), lease).run(TIMEOUT_S))
    runner = ThreadStepRunner(built.engine, waiting)
    runner.send(Add(request, handoff=True))
    num_layers, first = 0, ()
    async with asyncio.timeout(TIMEOUT_S):
        while not pull.done():
            outputs = await runner.outputs()
            first = first or tuple(token for output in outputs.tokens for token in output.token_ids)
            for progress in outputs.progress:
                if progress.done:
                    handoff = HandOff(replace(request, generated_ids=first), progress.computed, 0, "g")
                    outbox.commit(request.key, progress.block_ids, handoff.encode())
                    await pull
                else:
                    outbox.progress(request.key, progress.block_ids, progress.num_layers)
                if progress.num_layers is not None:
                    num_layers = progress.num_layers
                    await until_equal(setup.layout, source, target, progress.block_ids, target_ids, num_layers)
                    waiting.arrived.release()
    assert num_layers == setup.model.num_layers
    assert (await pull).num_frames == 2 * num_layers, "a frame of each layer and plane"
    await runner.stop()


async def until_equal(
    layout: CacheLayout, source: SharedPool, target: SharedPool, from_ids: tuple[int, ...], to_ids: tuple[int, ...],
    num_layers: int,
) -> None:  # fmt: skip
    planes, layers = range(len(layout.planes)), range(num_layers)
    await until(
        lambda: all(source.read(plane, layers, from_ids) == target.read(plane, layers, to_ids) for plane in planes),
        TIMEOUT_S,
    )
