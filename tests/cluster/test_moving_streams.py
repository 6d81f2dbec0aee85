"""Migration in running clusters: real engines, carriers, streams. Every ten tokens a request goes to the other decode
worker, and its tokens are those that it would have had anyway."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from engine.types import Request, Role, SamplingParams, TokenOutput
from tests.cluster.harness import LocalCluster, local_cluster
from tests.cluster.test_hits import write_windowed_model
from tests.cluster.tiny_model import write_tiny_model

NUM_TOKENS = 400  # enough for some moves, though a tiny model gives thousands of tokens in a second
SAMPLING = SamplingParams(max_tokens=NUM_TOKENS, temperature=1.0, seed=7, ignore_eos=True, repetition_penalty=1.1)
ASKED = Request("asked", tuple(7 + token % 90 for token in range(45)), SAMPLING)


async def migrate(cluster: LocalCluster, request_id: str) -> None:
    """Unless it has just begun to do so, for these streams are fast."""
    here = next((one.worker for one in cluster.dispatcher.moves.generating() if one.request_id == request_id), None)
    if here is not None:
        (there,) = [one for one in cluster.members.values() if one.role is Role.DECODE and one != here]
        await cluster.dispatcher.moves.migrate(request_id, there)


async def answer(cluster: LocalCluster, request: Request, every: int = 0) -> tuple[tuple[int, ...], list[TokenOutput]]:
    """Its tokens, and the outputs that brought them; with a migration each time when so many more have come."""
    tokens: list[int] = []
    seen: list[TokenOutput] = []
    async with aclosing(cluster.dispatcher.generate(request)) as outputs:
        async for output in outputs:
            num_before = len(tokens)
            tokens += output.token_ids
            seen.append(output)
            if every and num_before // every < len(tokens) // every and len(tokens) < NUM_TOKENS - 60:
                await migrate(cluster, request.request_id)
    return tuple(tokens), seen


@pytest.mark.parametrize(
    ("carrier", "ranks", "windowed"),
    [("grpc", 1, False), ("shm", 1, False), ("dist", 1, False), ("shm", 2, False), ("shm", 1, True)],
    ids=["grpc", "shm", "dist", "two ranks", "windows"],
)
async def test_a_stream_that_moves_every_ten_tokens_is_the_same(
    tmp_path: Path, carrier: str, ranks: int, windowed: bool
) -> None:
    model = (write_windowed_model if windowed else write_tiny_model)(tmp_path / "model")
    overrides = {
        "model.name": str(model), "engine.block_size": 8, "kv_transfer.carrier": carrier, "router.canary_s": 600.0,
        "pools.decode.tensor_parallel": ranks, "engine.runner": "process" if ranks > 1 else "thread",
        "engine.kernels": "torch",  # the slower way: a stream shall not end before it has moved
    }  # fmt: skip
    async with local_cluster(overrides, num_decode=2) as cluster:
        wanted, _ = await answer(cluster, replace(ASKED, request_id="stays"))
        tokens, seen = await answer(cluster, ASKED, every=10)
        assert tokens == wanted
        moved = sum(name == "migration_pause" for output in seen for name, _ in output.stages)
        assert moved >= 4
        assert dict(cluster.dispatcher.moves.counts) == {"moved": moved}
        (left, _), (right, _) = await asyncio.gather(
            answer(cluster, replace(ASKED, request_id="one"), every=10),
            answer(cluster, replace(ASKED, request_id="two")),
        )
        assert (left, right) == (wanted, wanted)
        await asyncio.sleep(0.5)
        for worker in cluster.workers.values():
            stats = worker._sides.status().stats
            assert (stats.num_leaked_blocks, stats.num_held, stats.num_running) == (0, 0, 0)
