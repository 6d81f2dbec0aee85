"""A conversation in a running cluster: of each turn only the blocks move that the decode worker has not kept."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from engine.types import Request, SamplingParams
from tests.cluster.harness import LocalCluster, local_cluster
from tests.cluster.test_carriers import carried
from tests.cluster.tiny_model import write_tiny_model

BLOCK = 8
WINDOW = 20
FIRST = tuple(7 + token % 90 for token in range(61))
SAMPLING = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
# All of these run under a policy that computes no prompt where it is decoded: nothing would move.


def write_windowed_model(folder: Path) -> Path:
    """The same weights, seen through a window by each layer."""
    config = write_tiny_model(folder) / "config.json"
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": WINDOW}
    config.write_text(json.dumps(json.loads(config.read_text()) | mistral))
    return folder


async def answer(cluster: LocalCluster, request: Request) -> tuple[tuple[int, ...], int]:
    """Its tokens, and how many of its prompt's were not computed."""
    async with aclosing(cluster.dispatcher.generate(request)) as outputs:
        seen = [output async for output in outputs]
    assert not [output.error for output in seen if output.error]
    return tuple(token for output in seen for token in output.token_ids), max(output.cached_tokens for output in seen)


def moved(cluster: LocalCluster) -> tuple[int, int]:
    """(bytes moved, bytes saved) so far."""
    totals = cluster.workers["decode-0"]._sides.status().transfers
    return totals.size_bytes, totals.saved_bytes


def pulls(cluster: LocalCluster) -> tuple[int, int]:
    """By the prefill worker, and by the decode worker, so far."""
    first, second = (cluster.workers[name]._sides.status().transfers.num_pulls for name in ("prefill-0", "decode-0"))
    return first, second


def needed(num_tokens: int, windowed: bool) -> range:
    """Indexes of the blocks that the token after so many sees."""
    first = max(0, num_tokens - WINDOW + 1) // BLOCK if windowed else 0
    return range(first, -(-num_tokens // BLOCK))


@pytest.mark.parametrize(
    ("carrier", "windowed"), [("grpc", False), ("grpc", True), ("shm", False), ("shm", True), ("dist", False)]
)
async def test_a_second_turn_moves_only_what_decode_has_not_kept(tmp_path: Path, carrier: str, windowed: bool) -> None:
    model = (write_windowed_model if windowed else write_tiny_model)(tmp_path / "model")
    overrides = {
        "model.name": str(model), "engine.runner": "thread", "engine.block_size": BLOCK, "kv_transfer.carrier": carrier,
        "router.canary_s": 600.0, "router.policy": "prefix_aware", "prefill.fetch_prefixes": False,
    }  # fmt: skip
    async with local_cluster(overrides) as cluster, httpx.AsyncClient(base_url=cluster.url, timeout=60) as client:
        block_bytes = cluster.workers["decode-0"]._sides._intake._layout.bytes_per_block
        before = moved(cluster)
        said, _ = await answer(cluster, Request("first", FIRST, SAMPLING))
        first = moved(cluster)
        assert first[0] - before[0] == len(needed(len(FIRST), windowed)) * block_bytes
        assert first[1] == before[1]

        turn = (*FIRST, *said, *range(40, 45))
        found, cached = await answer(cluster, Request("second", turn, SAMPLING))
        second = moved(cluster)
        num_kept = (len(FIRST) + len(said) - 1) // BLOCK  # the last token's KV was never stored
        missing = [index for index in needed(len(turn), windowed) if index >= num_kept]
        present = [index for index in needed(len(turn), windowed) if index < num_kept]
        assert present and missing
        assert second[0] - first[0] == len(missing) * block_bytes
        assert second[1] - first[1] == len(present) * block_bytes
        assert cached == len(FIRST) // BLOCK * BLOCK, "what prefill did not compute: it never had the answer"

        fresh, _ = await answer(cluster, Request("fresh", turn, SAMPLING, namespace="another"))
        assert found == fresh
        assert moved(cluster)[1] == second[1], "nothing is shared across namespaces"
        siblings = [answer(cluster, Request(f"again{index}", turn, SAMPLING)) for index in range(4)]
        assert [tokens for tokens, _ in await asyncio.gather(*siblings)] == [fresh] * 4
        await asyncio.sleep(1.2)  # a keep-alive tells the last of it
        metrics = (await client.get("/metrics")).text
        names = ("steelyard_kv_transfer_bytes", "steelyard_kv_transfer_bytes_saved")
        assert tuple(carried(metrics, name, carrier) for name in names) == moved(cluster)
        for worker in cluster.workers.values():
            stats = worker._sides.status().stats
            assert (stats.num_leaked_blocks, stats.num_held_blocks) == (0, 0)


async def test_the_next_turn_fetches_what_decode_has_of_the_last_one(tmp_path: Path) -> None:
    """Whether that is quicker is measured; the tokens are the same in any case. A prefill worker that was not heard in
    time on a busy machine leaves the turn to the decode worker, which has all of the last one."""
    overrides = {
        "model.name": str(write_tiny_model(tmp_path / "model")), "engine.runner": "thread", "engine.block_size": BLOCK,
        "router.canary_s": 600.0, "router.policy": "prefix_aware",
    }  # fmt: skip
    async with local_cluster(overrides) as cluster:
        said, _ = await answer(cluster, Request("first", FIRST, replace(SAMPLING, max_tokens=150)))
        turn = (*FIRST, *said, *range(40, 45))
        before = pulls(cluster)
        found, cached = await answer(cluster, Request("second", turn, SAMPLING))
        fetched, handed_off = (now > then for now, then in zip(pulls(cluster), before, strict=True))
        assert cached == (len(FIRST) + (len(said) - 1 if fetched or not handed_off else 0)) // BLOCK * BLOCK
        fresh, _ = await answer(cluster, Request("fresh", turn, SAMPLING, namespace="another"))
        assert found == fresh
