"""Embeddings of real workers, by HTTP: those of transformers, beside other requests, and after a worker's death."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from transformers import AutoModel

from router.policies.snapshot import Placement
from tests.cluster.harness import LocalCluster, local_cluster
from tests.cluster.tiny_model import NAME, byte_tokenizer, write_tiny_model
from tests.engine.test_models_pooling import write_pooling

TEXTS = ["hello there", "a", "one two three " * 40, "naïve 日本 " * 60]
TOLERANCE = 1e-4


def folder_of(path: Path, mode: str) -> Path:
    folder = write_tiny_model(path / NAME)
    write_pooling(folder, mode)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"is_matryoshka": True}))
    return folder


def settings(folder: Path) -> dict[str, object]:
    return {
        "model.name": str(folder), "engine.num_blocks": 512, "engine.host_tier_bytes": 0, "engine.runner": "thread",
        "engine.prefill_chunk": 64, "engine.calibrate_s": 0,
    }  # fmt: skip


@torch.inference_mode()
def expected(folder: Path, mode: str) -> list[np.ndarray]:
    model = AutoModel.from_pretrained(folder).eval()
    found = []
    for text in TEXTS:
        states = model(torch.tensor([token_ids(text)])).last_hidden_state[0]
        pooled = states[-1] if mode == "lasttoken" else states.mean(0)
        found.append(torch.nn.functional.normalize(pooled, dim=0).numpy())
    return found


def token_ids(text: str) -> list[int]:
    return byte_tokenizer().encode(text).ids


def placements(cluster: LocalCluster) -> list[Placement]:
    return [one.placement for one in cluster.dispatcher._live.values() if one.placement]


@pytest.mark.parametrize("mode", ["lasttoken", "mean_tokens"])
async def test_embeddings_of_a_cluster_are_those_of_transformers(tmp_path: Path, mode: str) -> None:
    folder = folder_of(tmp_path, mode)
    wanted = expected(folder, mode)
    async with (
        local_cluster(settings(folder), num_prefill=2) as cluster,
        httpx.AsyncClient(base_url=cluster.url, timeout=60) as client,
    ):

        async def embed(texts: list[str], **fields: object) -> dict:
            reply = await client.post("/v1/embeddings", json={"model": NAME, "input": texts, **fields})
            assert reply.status_code == 200, reply.text
            return reply.json()

        def check(reply: dict) -> None:
            for one, vector in zip(reply["data"], wanted, strict=True):
                np.testing.assert_allclose(one["embedding"], vector, rtol=0, atol=TOLERANCE)

        body = {"model": NAME, "prompt": "abc", "max_tokens": 20, "ignore_eos": True}
        first, _ = await asyncio.gather(embed(TEXTS), client.post("/v1/completions", json=body))
        check(first)
        assert first["usage"]["prompt_tokens"] == sum(len(token_ids(text)) for text in TEXTS)
        (cut,) = (await embed(TEXTS[:1], dimensions=8))["data"]
        np.testing.assert_allclose(cut["embedding"], wanted[0][:8] / np.linalg.norm(wanted[0][:8]), atol=TOLERANCE)

        late = [asyncio.create_task(embed(TEXTS)) for _ in range(6)]
        async with asyncio.timeout(10):
            while not (placed := placements(cluster)):  # noqa: ASYNC110 (no event)
                await asyncio.sleep(0)
        assert all(one.decode is None for one in placed)
        await cluster.workers[placed[0].first.worker_id].stop()
        for reply in await asyncio.gather(*late):
            check(reply)
        assert not cluster.dispatcher._live
        left = [worker for name, worker in cluster.workers.items() if name != placed[0].first.worker_id]
        for worker in left:
            stats = worker._sides.status().stats
            assert (stats.num_running, stats.num_waiting, stats.num_held, stats.num_leaked_blocks) == (0, 0, 0, 0)
