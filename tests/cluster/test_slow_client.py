"""A client that stops reading, in front of real workers: it holds up nobody, holds little, and misses nothing."""

from __future__ import annotations

import asyncio
import json
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import httpx
import pytest

from cluster.connection import WRITE_BUFFER_BYTES
from tests.cluster.harness import LocalCluster, local_cluster
from tests.cluster.hostile import CHAT, chat, post
from tests.cluster.serving import connect, read_to_end, read_until, send
from tests.cluster.tiny_model import NAME, write_tiny_model
from tests.oracle.test_accounting import refresh, settled

pytestmark = pytest.mark.slow

NUM_TOKENS = 800
PATIENCE_S = 60.0
RECEIVE_BYTES = 4096
LONG = chat(
    stream=True, logprobs=True, top_logprobs=20, max_tokens=NUM_TOKENS, ignore_eos=True, seed=3, temperature=0.9
)  # some 2 KB for each token: the kernel's buffers take a fraction of it


def started(folder: Path, **router: float) -> AbstractAsyncContextManager[LocalCluster]:
    model = str(write_tiny_model(folder / NAME))
    settings = {f"router.{key}": value for key, value in router.items()}
    return local_cluster({"model.name": model, "engine.runner": "thread", "engine.num_blocks": 512, **settings})


def logprobs_of(stream: str) -> tuple[list[float], int]:
    """Of every token in order, and how many events brought them."""
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    scored = [choice["logprobs"]["content"] for one in events for choice in one["choices"] if choice["logprobs"]]
    return [token["logprob"] for one in scored for token in one], len(scored)


def held_for(cluster: LocalCluster) -> tuple[int, int]:
    """What waits for the slow client: outputs in its backlog, and bytes in the server's memory."""
    assert cluster.gateway._server is not None
    outputs = sum(len(live._events._events) for live in cluster.dispatcher._live.values())
    sizes = [one.transport.get_write_buffer_size() for one in cluster.gateway._server.server_state.connections]
    return outputs, max(sizes, default=0)


async def all_tokens_wait(cluster: LocalCluster) -> None:
    """Returns when the workers have made all tokens, and their client has not taken them."""
    async with asyncio.timeout(PATIENCE_S):
        before = -1
        while (now := held_for(cluster)[0]) != before or now < NUM_TOKENS // 4:
            before = now
            await asyncio.sleep(0.5)


async def test_it_holds_up_nobody_and_gets_every_token_when_it_reads_on(tmp_path: Path) -> None:
    async with (
        started(tmp_path) as cluster,
        httpx.AsyncClient(base_url=cluster.url, timeout=PATIENCE_S) as other,
        connect(int(cluster.url.rpartition(":")[2]), RECEIVE_BYTES) as slow,
    ):
        expected, num_events_of_others = logprobs_of((await other.post(CHAT, json=LONG)).text)
        assert len(expected) == NUM_TOKENS
        short = LONG | {"max_tokens": 20}
        await send(slow, post(CHAT, LONG, "Connection: close"))
        started_with = await read_until(slow, b"data: ")
        waiting = asyncio.create_task(all_tokens_wait(cluster))
        while not waiting.done():
            tokens, _ = logprobs_of((await other.post(CHAT, json=short)).text)
            assert tokens == expected[:20]
            outputs, num_bytes = held_for(cluster)
            assert outputs <= NUM_TOKENS and num_bytes < WRITE_BUFFER_BYTES + 2**16
        await waiting
        text = _without_chunks(started_with + await read_to_end(slow))
        tokens, num_events = logprobs_of(text)
        assert tokens == expected and text.endswith("data: [DONE]\n\n")
        assert num_events < num_events_of_others / 2, "what waited came in few pieces"
        await refresh(cluster)
        assert await settled(cluster) == {}


async def test_it_is_let_go_when_it_never_reads_on(tmp_path: Path) -> None:
    async with started(tmp_path, write_timeout_s=1.0) as cluster:
        async with connect(int(cluster.url.rpartition(":")[2]), RECEIVE_BYTES) as slow:
            await send(slow, post(CHAT, LONG | {"max_tokens": 3000}))
            await read_until(slow, b"data: ")
            async with (
                httpx.AsyncClient(base_url=cluster.url, timeout=PATIENCE_S) as other,
                asyncio.timeout(PATIENCE_S),
            ):
                while not _was_let_go((await other.get("/metrics")).text):  # noqa: ASYNC110 (a scrape now and then)
                    await asyncio.sleep(0.1)
            assert b"[DONE]" not in await read_to_end(slow)  # what it had received before
        await refresh(cluster)
        assert await settled(cluster) == {}


def _was_let_go(metrics: str) -> bool:
    return f'steelyard_clients_let_go_total{{model_name="{NAME}"}} 1.0' in metrics


def _without_chunks(answer: bytes) -> str:
    """The body of an answer in chunks."""
    _, _, rest = answer.partition(b"\r\n\r\n")
    body = bytearray()
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]
    return body.decode()
