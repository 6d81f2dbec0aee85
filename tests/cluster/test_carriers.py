"""What carries KV in a running cluster: the same tokens by each carrier, and metrics that say which it was."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import httpx
import pytest

from tests.cluster.harness import local_cluster
from tests.cluster.tiny_model import write_tiny_model

PROMPTS = [[index + token % 7 for token in range(30 + 11 * index)] for index in range(6)]


async def answers_by(carrier: str, model: Path, runner: str) -> tuple[list[str], str]:
    """The texts of all prompts at once, and the gateway's metrics after them."""
    overrides = {"model.name": str(model), "engine.runner": runner, "kv_transfer.carrier": carrier}
    async with local_cluster(overrides) as cluster, httpx.AsyncClient(base_url=cluster.url, timeout=60) as client:
        base = {"model": "model", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        replies = await asyncio.gather(
            *(client.post("/v1/completions", json=base | {"prompt": prompt}) for prompt in PROMPTS)
        )
        await asyncio.sleep(1.2)  # a keep-alive tells the last of it
        metrics = (await client.get("/metrics")).text
        return [reply.json()["choices"][0]["text"] for reply in replies], metrics


def carried(metrics: str, name: str, carrier: str) -> float:
    """The value on the decode worker."""
    found = re.findall(rf'^{name}{{carrier="{carrier}",engine="decode-0".*}} (\S+)$', metrics, re.MULTILINE)
    return float(found[0]) if found else 0.0


@pytest.mark.parametrize("runner", ["thread", "process"])
async def test_tokens_are_the_same_by_each_carrier_and_metrics_name_it(tmp_path: Path, runner: str) -> None:
    model = write_tiny_model(tmp_path / "model")
    by_grpc, told_of_grpc = await answers_by("grpc", model, runner)
    by_shm, told_of_shm = await answers_by("auto", model, runner)
    assert by_grpc == by_shm
    assert len(set(by_grpc)) > 1
    for metrics, used, other in ((told_of_grpc, "grpc", "shm"), (told_of_shm, "shm", "grpc")):
        assert carried(metrics, "steelyard_kv_transfers", used) >= len(PROMPTS), "the canary's too"
        assert carried(metrics, "steelyard_kv_transfer_bytes", used) > 0
        assert carried(metrics, "steelyard_kv_transfers", other) == 0
        assert carried(metrics, "steelyard_kv_carrier_fallbacks", used) == 0
        assert re.search(rf'^steelyard_kv_path_gb_per_second{{carrier="{used}".*peer="prefill-0"}} ', metrics, re.M)


async def test_when_no_carrier_may_be_used_decode_computes_the_request_itself(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    overrides = {"model.name": str(model), "engine.runner": "thread"}
    async with local_cluster(overrides) as cluster, httpx.AsyncClient(base_url=cluster.url, timeout=60) as client:
        body = {"model": "model", "prompt": PROMPTS[3], "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        before = (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"]
        carriers = cluster.workers["decode-0"]._carriers
        num_pulls = cluster.workers["decode-0"]._sides.status().transfers.num_pulls
        await carriers.close()  # the pair is measured anew, by a stricter rule
        carriers._config = carriers._config.model_copy(update={"min_gb_per_s": 1e6})
        after = await client.post("/v1/completions", json=body)
        assert after.json()["choices"][0]["text"] == before
        transfers = cluster.workers["decode-0"]._sides.status().transfers
        assert (transfers.num_pulls, transfers.num_failed) == (num_pulls, 1)
