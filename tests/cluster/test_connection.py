"""Connections to the gateway's server, by raw bytes: what is late, too large or no HTTP costs no more than it may."""

from __future__ import annotations

import asyncio
import json
import logging
import socket

import httpx
import pytest

from cluster.connection import MAX_HEAD_BYTES
from engine.types import Request
from tests.cluster.serving import PATIENCE_S, Served, connect, post, read_to_end, read_until, send, serve
from tests.router.fakes import CHAT, COMPLETIONS, FakeGenerator, chat, completion, events, say, stall

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n".encode()
STREAM = json.dumps(chat(stream=True)).encode()
LONG = "x" * 20_000
RECEIVE_BYTES = 4096


async def until_closed(served: Served) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while served.num_connections:  # noqa: ASYNC110 (uvicorn's set has no event)
            await asyncio.sleep(0.01)


async def dribble(client: socket.socket, data: bytes) -> None:
    """Send again and again, until the server has closed."""
    while await send(client, data):  # noqa: ASYNC110 (a client's pace)
        await asyncio.sleep(0.02)


# --- late -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [b"", b"GET", b"GET /health HTTP/1.1\r\nHost:", b"\r\n\r\n"])
async def test_a_head_that_never_is_complete_is_given_up(start: bytes) -> None:
    async with serve(FakeGenerator(), read_timeout_s=0.2) as served, connect(served.port) as client:
        await send(client, start)
        assert await read_to_end(client) == b""
        await until_closed(served)


@pytest.mark.parametrize(
    ("start", "again"),
    [
        (b"", b"\r\n"),
        (HEALTH, b"\r\n"),
        (b"GET /health HTTP/1.1\r\nA: ", b"x"),
        (HEALTH + b"GET /health HTTP/1.1\r\nA: ", b"x"),
    ],
)
async def test_a_head_that_dribbles_in_is_given_up(start: bytes, again: bytes) -> None:
    async with serve(FakeGenerator(), read_timeout_s=0.2) as served, connect(served.port) as client:
        await send(client, start)
        async with asyncio.timeout(PATIENCE_S):
            await dribble(client, again)
        await until_closed(served)


@pytest.mark.parametrize("start", [b"", b"{", STREAM[:-1]])
async def test_a_body_that_never_is_complete_gets_a_408(start: bytes) -> None:
    generator = FakeGenerator()
    async with serve(generator, read_timeout_s=0.2) as served:
        for request in (post(CHAT, STREAM)[: -len(STREAM)] + start, CHUNKED + b"\r\n5\r\nabc"):
            async with connect(served.port) as client:
                await send(client, request)
                head, _, body = (await read_to_end(client)).partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 408 ") and b"connection: close" in head.lower()
                assert json.loads(body)["error"]["code"] == "request_timeout"
        await until_closed(served)
    assert generator.requests == []


async def test_a_connection_that_is_used_again_and_again_is_kept() -> None:
    async with serve(FakeGenerator(), read_timeout_s=0.3) as served, connect(served.port) as client:
        for _ in range(8):
            await send(client, HEALTH)
            assert b" 200 " in await read_until(client, b"}]")
            await asyncio.sleep(0.1)


# --- too large, or no HTTP ------------------------------------------------------------------------------------

BIG = b"a" * 10 * MAX_HEAD_BYTES  # a read of up to 256 KiB is looked at as a whole
TOO_LARGE = {
    "request line": b"GET /" + BIG + b" HTTP/1.1\r\n\r\n",
    "one header": b"GET / HTTP/1.1\r\nA: " + BIG,
    "many headers": b"GET / HTTP/1.1\r\n" + b"".join(b"A%d: b\r\n" % index for index in range(20_000)),
    "a header's name": b"GET / HTTP/1.1\r\n" + BIG,
    "a chunk's extension": CHUNKED + b"\r\n1;" + BIG,
    "trailers": CHUNKED + b"\r\n0\r\n" + b"".join(b"A%d: b\r\n" % index for index in range(20_000)),
    "one trailer": CHUNKED + b"\r\n0\r\nA: " + BIG,
}


@pytest.mark.parametrize("data", TOO_LARGE.values(), ids=TOO_LARGE)
async def test_what_is_no_content_and_yet_too_large_is_refused(data: bytes) -> None:
    async with serve(FakeGenerator()) as served:
        async with connect(served.port) as client:
            for start in range(0, len(data), 16_384):
                if not await send(client, data[start : start + 16_384]):
                    break
            answer = await read_to_end(client)
            assert answer == b"" or answer.startswith(b"HTTP/1.1 431 "), answer  # a reset may overtake the answer
            await until_closed(served)
        async with httpx.AsyncClient(base_url=served.url) as client:
            assert (await client.get("/health")).status_code == 200


async def test_a_head_of_many_headers_is_taken() -> None:
    async with serve(FakeGenerator()) as served, httpx.AsyncClient(base_url=served.url) as client:
        headers = {f"x-{index}": "a" * 500 for index in range(100)}
        assert (await client.post(CHAT, json=chat(), headers=headers)).status_code == 200


@pytest.mark.parametrize("data", [b"\x16\x03\x01\x02\x00\x01\x00", b"nonsense\r\n\r\n"])
async def test_what_is_no_http_gets_a_400_in_the_apis_format(data: bytes) -> None:
    async with serve(FakeGenerator()) as served, connect(served.port) as client:
        await send(client, data)
        head, _, body = (await read_to_end(client)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert json.loads(body)["error"]["type"] == "invalid_request_error"


async def test_garbage_after_a_request_is_not_answered_in_the_midst_of_its_answer() -> None:
    generator = FakeGenerator(stall(2))
    async with serve(generator) as served, connect(served.port) as client:
        await send(client, post(CHAT, STREAM))
        await read_until(client, b'"x"')
        await send(client, b"\x00garbage\r\n\r\n")
        assert b"HTTP/1.1" not in await read_to_end(client)
        await asyncio.wait_for(generator.closed.wait(), PATIENCE_S)
        await until_closed(served)


async def test_going_away_ends_a_request_though_another_waits_behind_it() -> None:
    generator = FakeGenerator(stall(2))
    async with serve(generator) as served:
        async with connect(served.port) as client:
            await send(client, post(CHAT, STREAM) + HEALTH)
            await read_until(client, b'"x"')
        await asyncio.wait_for(generator.closed.wait(), PATIENCE_S)
        assert generator.live == {}
        await until_closed(served)


# --- too many -------------------------------------------------------------------------------------------------


async def test_connections_beyond_the_limit_get_a_503(caplog: pytest.LogCaptureFixture) -> None:
    async with serve(FakeGenerator(), max_connections=2) as served:
        async with connect(served.port) as first, connect(served.port) as second:
            for client in (first, second):
                await send(client, HEALTH)
                await read_until(client, b"}]")
            async with connect(served.port) as third:
                answer = await read_to_end(third)
                assert answer.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1" in answer
                assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "unavailable"
            assert any("a connection was refused: 2 are open" in record.getMessage() for record in caplog.records)
            await send(second, HEALTH)
            assert b" 200 " in await read_until(second, b"}]")
        await until_closed(served)
        async with httpx.AsyncClient(base_url=served.url) as client:
            assert (await client.get("/health")).status_code == 200


# --- clients that do not read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_never_reads_is_let_go(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    generator = FakeGenerator(say(LONG * 50, size=1 if stream else 1000))
    async with serve(generator, write_timeout_s=0.3) as served:
        async with connect(served.port, RECEIVE_BYTES) as client:
            await send(client, post(CHAT, json.dumps(chat(stream=stream)).encode()))
            await asyncio.wait_for(generator.closed.wait(), PATIENCE_S)
            await until_closed(served)
        async with httpx.AsyncClient(base_url=served.url) as other:
            metrics = (await other.get("/metrics")).text
    assert any("took nothing for 0.3 s" in record.getMessage() for record in caplog.records)
    assert all(record.levelno < logging.ERROR for record in caplog.records)
    assert f'steelyard_clients_let_go_total{{model_name="tiny/bytes"}} {float(stream)}' in metrics


async def test_a_client_that_takes_a_whole_answer_slowly_is_not_let_go() -> None:
    async with serve(FakeGenerator(say(LONG * 50, size=1000)), write_timeout_s=0.4) as served:
        async with connect(served.port, RECEIVE_BYTES) as client:
            await send(client, post(CHAT, json.dumps(chat()).encode(), "Connection: close"))
            loop, received = asyncio.get_running_loop(), bytearray()
            async with asyncio.timeout(PATIENCE_S):
                while chunk := await loop.sock_recv(client, 2**16):
                    received += chunk
                    await asyncio.sleep(0.005)
        assert received.count(b"x" * 1000) == len(LONG) * 50 // 1000
        await until_closed(served)


async def test_a_slow_client_holds_up_nobody_and_gets_everything_when_it_reads_on() -> None:
    num_made = 0

    async def script(request: Request):
        nonlocal num_made
        async for one in say(LONG)(request) if request.sampling.max_tokens > 16 else say("short")(request):
            num_made += request.sampling.max_tokens > 16
            yield one

    long = json.dumps(completion("a", stream=True, max_tokens=200)).encode()
    async with serve(FakeGenerator(script)) as served, connect(served.port, RECEIVE_BYTES) as slow:
        await send(slow, post(COMPLETIONS, long, "Connection: close"))
        async with httpx.AsyncClient(base_url=served.url) as other:
            made = -1
            async with asyncio.timeout(PATIENCE_S):
                while made < num_made or not made:  # until nothing more is made for the one who does not read
                    made = num_made
                    reply = await other.post(COMPLETIONS, json=completion("a", stream=True, max_tokens=9))
                    assert "".join(one["choices"][0]["text"] for one in events(reply)) == "short"
        assert num_made < len(LONG) / 2
        answer = await read_to_end(slow)
        assert answer.count(b'"text":"x"') == len(LONG) and b"[DONE]" in answer
