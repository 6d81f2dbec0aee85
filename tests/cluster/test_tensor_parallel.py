"""The golden law for workers of several ranks: whatever sizes prefill and decode have, the tokens are those of one."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import httpx
import pytest

from engine.step_runner import ProcessStepRunner
from tests.cluster.harness import LocalCluster, local_cluster
from tests.cluster.test_carriers import PROMPTS
from tests.cluster.tiny_model import write_tiny_model
from tests.engine.test_ranks import children_of

pytestmark = pytest.mark.slow


def overrides(model: Path, prefill: int, decode: int, carrier: str) -> dict[str, object]:
    return {
        "model.name": str(model), "kv_transfer.carrier": carrier, "engine.num_blocks": 512,
        "pools.prefill.tensor_parallel": prefill, "pools.decode.tensor_parallel": decode,
        "model.max_context": 2048, "kv_transfer.layer_group_bytes": 1,
    }  # fmt: skip


async def answers(cluster: LocalCluster) -> list[str]:
    """Of all prompts at once: greedy, and sampled."""
    base = {"model": "model", "max_tokens": 12, "ignore_eos": True, "seed": 5}
    bodies = [base | {"prompt": prompt, "temperature": index % 2} for index, prompt in enumerate(PROMPTS)]
    async with httpx.AsyncClient(base_url=cluster.url, timeout=60) as client:
        replies = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
    return [reply.json()["choices"][0]["text"] for reply in replies]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("ranks") / "model")


@pytest.fixture(scope="module")
def wanted(model: Path) -> list[str]:
    """By one worker of one rank that does both phases."""

    async def alone() -> list[str]:
        async with local_cluster(overrides(model, 1, 1, "auto")) as cluster:
            del cluster.members["decode-0"]
            cluster.publish()
            return await answers(cluster)

    return asyncio.run(alone())


@pytest.mark.parametrize("carrier", ["grpc", "shm", "dist"])
@pytest.mark.parametrize(("prefill", "decode"), [(1, 1), (2, 1), (1, 2)])
async def test_tokens_are_those_of_one_engine(
    model: Path, wanted: list[str], prefill: int, decode: int, carrier: str
) -> None:
    async with local_cluster(overrides(model, prefill, decode, carrier)) as cluster:
        assert await answers(cluster) == wanted
        transfers = cluster.workers["decode-0"]._sides.status().transfers
        assert transfers.num_pulls >= len(PROMPTS)
        assert [one.carrier for one in transfers.carriers] == [carrier]
        cohorts = {member.cohort for member in cluster.members.values()}
        assert len(cohorts) == 1, "sizes may differ within a cohort"


async def test_a_killed_rank_ends_its_worker_and_the_request_goes_on_elsewhere(model: Path, wanted: list[str]) -> None:
    async with local_cluster(overrides(model, 1, 2, "auto"), num_decode=2) as cluster:
        assert await answers(cluster) == wanted
        engine = cluster.workers["decode-0"]._runner
        assert isinstance(engine, ProcessStepRunner)
        (follower,) = children_of(engine.pid)
        asking = asyncio.create_task(answers(cluster))
        await asyncio.sleep(0.05)
        os.kill(follower, signal.SIGKILL)
        reason = await cluster.workers["decode-0"].failed()
        assert str(engine.pid) in reason
        del cluster.members["decode-0"]
        cluster.publish()
        assert await asking == wanted
