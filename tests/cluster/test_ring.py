"""The golden law for pools that are reached through a ring: the tokens are those of mapped pools, by each carrier."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cluster.config import load_config
from engine.ring import RingPool
from engine.types import Role
from tests.cluster.harness import local_cluster
from tests.cluster.test_tensor_parallel import answers
from tests.cluster.tiny_model import write_tiny_model


def overrides(model: Path, pool: str, carrier: str) -> dict[str, object]:
    """With a ring of three frames, of which two can be lent."""
    return {
        "model.name": str(model), "engine.runner": "thread", "engine.num_blocks": 512, "engine.pool": pool,
        "kv_transfer.carrier": carrier, "kv_transfer.frame_bytes": 4096, "kv_transfer.ring_bytes": 3 * 4096,
        "router.port": 0,
    }  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("ring") / "model")


@pytest.fixture(scope="module")
def wanted(model: Path) -> list[str]:
    async def mapped() -> list[str]:
        async with local_cluster(overrides(model, "mapped", "auto")) as cluster:
            return await answers(cluster)

    return asyncio.run(mapped())


@pytest.mark.parametrize("carrier", ["shm", "grpc"])
@pytest.mark.parametrize(("prefill", "decode"), [("ring", "ring"), ("ring", "mapped"), ("mapped", "ring")])
async def test_tokens_through_a_ring_are_those_of_mapped_pools(
    model: Path, wanted: list[str], prefill: str, decode: str, carrier: str
) -> None:
    async with local_cluster(overrides(model, prefill, carrier)) as cluster:
        if decode != prefill:
            await cluster.workers["decode-0"].stop()
            cluster.config = load_config("configs/local.yaml", overrides(model, decode, carrier))
            await cluster.start_worker(Role.DECODE)
        status = cluster.workers["decode-0"]._sides.status
        async with asyncio.timeout(30):  # the gateway may not have met the new worker yet
            while not status().transfers.num_pulls:
                assert await answers(cluster) == wanted
        for name, pool in (("prefill-0", prefill), ("decode-0", decode)):
            assert isinstance(cluster.workers[name]._block_bytes, RingPool) == (pool == "ring")
        transfers = status().transfers
        assert [one.carrier for one in transfers.carriers] == [carrier]
        assert transfers.num_failed == 0
        outbox = cluster.workers["prefill-0"]._sides.outbox
        assert outbox._staging is None or outbox.num_leases or not outbox._staging.num_lent, "no lease, no slot"
