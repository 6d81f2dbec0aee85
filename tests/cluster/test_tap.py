"""Streams whose events are written past their tasks: through dispatcher and server, to sockets."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from cluster.connection import MOST_PIECES, WRITE_BUFFER_BYTES
from engine.types import FinishReason, Key
from router.merge import MAX_MERGED_TOKENS
from tests.cluster.serving import PATIENCE_S, Served, connect, post, read_to_end, read_until, send, serve
from tests.router.fake_workers import Cluster, FakeWorker, ready, token
from tests.router.fakes import COMPLETIONS, MODEL, completion
from tests.virtual import settle

RECEIVE_BYTES = 4096
NUM_LATE = 20_000  # tokens for a client that does not read: megabytes of events


@asynccontextmanager
async def gateway() -> AsyncIterator[tuple[Cluster, Served]]:
    cluster = await ready("p0")
    try:
        async with serve(cluster.dispatcher, write_timeout_s=5.0) as served:
            yield cluster, served
    finally:
        await cluster.dispatcher.close()


async def ask(client: socket.socket, worker: FakeWorker, **fields: object) -> Key:
    """A stream that has begun: its first token is A."""
    before = len(worker.submissions)
    body = json.dumps(completion("hi", stream=True, max_tokens=16, **fields)).encode()
    await send(client, post(COMPLETIONS, body, "Connection: close"))
    async with asyncio.timeout(PATIENCE_S):
        while len(worker.submissions) == before:  # noqa: ASYNC110 (a fake has no event)
            await asyncio.sleep(0.01)
    worker.say(token(worker.key, 0, ord("A")))
    await read_until(client, b"\n\n")
    return worker.key


def texts_of(answer: bytes) -> list[str]:
    """Of each event that has text. A chunk's frame is a line of its own."""
    events = [json.loads(line[6:]) for line in answer.split(b"\n") if line.startswith(b"data: {")]
    return [choice["text"] for event in events for choice in event["choices"] if choice["text"]]


def say(worker: FakeWorker, key: Key, ids: bytes, first_index: int = 1) -> None:
    """A batch for each, and the end."""
    for index, one in enumerate(ids, first_index):
        worker.say(token(key, index, one))
    worker.say(token(key, first_index + len(ids), ord("Z"), finish=FinishReason.LENGTH))


@pytest.mark.parametrize("fields", [{}, {"stop": ["never"]}, {"logprobs": 0}])
async def test_each_token_has_an_event_and_the_end_comes_last(fields: dict[str, object]) -> None:
    """With or without a tap."""
    async with gateway() as (cluster, served), connect(served.port) as client:
        key = await ask(client, cluster["p0"], **fields)
        for index, one in enumerate(b"BCD", 1):
            cluster["p0"].say(token(key, index, one))
            assert texts_of(await read_until(client, b"\n\n")) == [chr(one)]
        say(cluster["p0"], key, "é!".encode(), first_index=4)
        answer = await read_to_end(client)
        assert "".join(texts_of(answer)) == "é!Z"  # what came at once may be one event
        assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


async def test_its_metrics_count_every_token_once() -> None:
    async with gateway() as (cluster, served), connect(served.port) as client:
        key = await ask(client, cluster["p0"])
        for index in range(1, 8):
            cluster["p0"].say(token(key, index, ord("B")))
            await read_until(client, b"\n\n")
        say(cluster["p0"], key, b"", first_index=8)
        await read_to_end(client)
        async with httpx.AsyncClient(base_url=served.url) as other:
            metrics = (await other.get("/metrics")).text
        assert f'vllm:generation_tokens_total{{model_name="{MODEL}"}} 9.0' in metrics
        assert f'vllm:inter_token_latency_seconds_count{{model_name="{MODEL}"}} 8.0' in metrics
        assert f'vllm:time_to_first_token_seconds_count{{model_name="{MODEL}"}} 1.0' in metrics


async def test_a_client_that_does_not_read_gets_in_few_pieces_what_waited() -> None:
    async with gateway() as (cluster, served), connect(served.port, RECEIVE_BYTES) as slow:
        key = await ask(slow, cluster["p0"])
        for index in range(1, NUM_LATE):
            cluster["p0"].say(token(key, index, ord("B")))
            if index % 100 == 0:
                await asyncio.sleep(0)
        cluster["p0"].say(token(key, NUM_LATE, ord("Z"), finish=FinishReason.LENGTH))
        await settle()
        (connection,) = served.server.server_state.connections
        assert connection.transport.get_write_buffer_size() < WRITE_BUFFER_BYTES + 2**16
        texts = texts_of(await read_to_end(slow))
        assert "".join(texts) == "B" * (NUM_LATE - 1) + "Z"
        assert len(texts) < NUM_LATE / 2


async def test_what_comes_all_at_once_is_bounded_and_complete() -> None:
    async with gateway() as (cluster, served), connect(served.port) as client:
        key = await ask(client, cluster["p0"])
        cluster["p0"].say(*(token(key, index, ord("B")) for index in range(1, NUM_LATE)))
        say(cluster["p0"], key, b"", first_index=NUM_LATE)
        texts = texts_of(await read_to_end(client))
        assert "".join(texts) == "B" * (NUM_LATE - 1) + "Z"
        assert len(texts) <= MOST_PIECES + NUM_LATE / MAX_MERGED_TOKENS + 2


async def test_a_client_that_leaves_ends_its_request() -> None:
    async with gateway() as (cluster, served):
        async with connect(served.port) as client:
            key = await ask(client, cluster["p0"])
            cluster["p0"].say(token(key, 1, ord("B")))
            await read_until(client, b"\n\n")
        async with asyncio.timeout(PATIENCE_S):
            while key not in cluster["p0"].aborted:  # noqa: ASYNC110 (a fake has no event)
                await asyncio.sleep(0.01)


async def test_a_worker_that_is_lost_is_followed_by_another_without_a_gap() -> None:
    async with gateway() as (cluster, served), connect(served.port) as client:
        key = await ask(client, cluster["p0"])
        cluster["p0"].say(token(key, 1, ord("B")))
        await read_until(client, b"\n\n")
        cluster["p0"].break_stream()
        async with asyncio.timeout(PATIENCE_S):
            while cluster["p0"].key == key:  # noqa: ASYNC110 (a fake has no event)
                await asyncio.sleep(0.01)
        placed = cluster["p0"].submissions[-1].request
        assert placed.generated_ids == (ord("A"), ord("B"))
        say(cluster["p0"], placed.key, b"C", first_index=2)
        assert "".join(texts_of(await read_to_end(client))) == "CZ"
