"""The golden law for pools that are reached through a ring: the tokens are those of mapped pools, by each carrier."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.ring import RingPool
from tests.cluster.harness import local_cluster
from tests.cluster.test_tensor_parallel import answers
from tests.cluster.tiny_model import write_tiny_model


@pytest.mark.parametrize("carrier", ["shm", "grpc"])
async def test_tokens_through_a_ring_are_those_of_mapped_pools(tmp_path: Path, carrier: str) -> None:
    model = write_tiny_model(tmp_path / "model")
    base = {
        "model.name": str(model), "engine.runner": "thread", "engine.num_blocks": 512, "kv_transfer.carrier": carrier,
        "kv_transfer.frame_bytes": 4096, "kv_transfer.ring_bytes": 3 * 4096,
    }  # fmt: skip
    async with local_cluster(base | {"engine.pool": "mapped"}) as cluster:
        wanted = await answers(cluster)
    async with local_cluster(base | {"engine.pool": "ring"}) as cluster:
        assert await answers(cluster) == wanted
        for worker in cluster.workers.values():
            assert isinstance(worker._block_bytes, RingPool)
        transfers = cluster.workers["decode-0"]._sides.status().transfers
        assert [one.carrier for one in transfers.carriers] == [carrier]
        assert transfers.num_failed == 0
        staging = cluster.workers["prefill-0"]._sides.outbox._staging
        assert staging is not None
        assert staging.num_lent == 0, "of a lease that was released no slot is left"
