"""A client that goes away: its request is aborted at once, whether it streamed, waited or was still sending."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Literal

import httpx
import pytest
from starlette.types import Message

from tests.router.fakes import CHAT, FakeGenerator, chat, fail, make_app, make_client, stall
from tests.router.serving import serve

BOTH = pytest.mark.parametrize("http", ["h11", "httptools"])
STREAM = pytest.mark.parametrize("stream", [False, True])


class Client:
    """The server's side of one POST, by hand: `gone` is set when the client goes away."""

    def __init__(self, body: bytes, more_body: bool = False) -> None:
        self.gone = asyncio.Event()
        self.sent: list[Message] = []
        self._body: Message | None = {"type": "http.request", "body": body, "more_body": more_body}

    async def receive(self) -> Message:
        message, self._body = self._body, None
        if message is not None:
            return message
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    async def post(self, generator: FakeGenerator) -> None:
        scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": CHAT}
        scope |= {"raw_path": CHAT.encode(), "root_path": "", "query_string": b"", "headers": [], "scheme": "http"}
        await make_app(generator)(scope, self.receive, self.send)


class Stuck(Client):
    """Takes the headers and reads no further."""

    def __init__(self, body: bytes) -> None:
        super().__init__(body)
        self.full = asyncio.Event()

    async def send(self, message: Message) -> None:
        await super().send(message)
        if message["type"] == "http.response.body":
            self.full.set()
            await asyncio.Event().wait()


@STREAM
@pytest.mark.parametrize("after", [0, 2])
async def test_going_away_aborts_the_request(stream: bool, after: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "router")
    generator = FakeGenerator(stall(after))
    client = Client(json.dumps(chat(stream=stream)).encode())
    posting = asyncio.create_task(client.post(generator))
    await generator.started.wait()
    assert not generator.closed.is_set()
    client.gone.set()
    await asyncio.wait_for(posting, 5)
    assert generator.live == {}
    assert any("went away" in record.getMessage() for record in caplog.records)
    num_started = sum(message["type"] == "http.response.start" for message in client.sent)
    assert num_started == (1 if stream and after else 0)


@STREAM
async def test_going_away_before_the_answer_was_read_aborts_the_request(stream: bool) -> None:
    generator = FakeGenerator()
    client = Stuck(json.dumps(chat(stream=stream)).encode())
    posting = asyncio.create_task(client.post(generator))
    await client.full.wait()
    assert len(generator.live) == stream  # a whole answer is sent when the request is over
    client.gone.set()
    await asyncio.wait_for(posting, 5)
    assert generator.live == {}


async def test_going_away_while_sending_begins_nothing() -> None:
    generator = FakeGenerator()
    client = Client(b"{", more_body=True)
    client.gone.set()
    await client.post(generator)
    assert generator.requests == []
    assert client.sent == []


@STREAM
async def test_a_server_that_stops_aborts_the_request(stream: bool) -> None:
    generator = FakeGenerator(stall(1))
    posting = asyncio.create_task(Client(json.dumps(chat(stream=stream)).encode()).post(generator))
    await generator.started.wait()
    posting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await posting
    assert generator.live == {}


@BOTH
async def test_a_closed_connection_aborts_a_stream(http: Literal["h11", "httptools"]) -> None:
    generator = FakeGenerator(stall(2))
    async with serve(generator, http) as address, httpx.AsyncClient(base_url=address) as client:
        async with client.stream("POST", CHAT, json=chat(stream=True)) as reply:
            assert reply.status_code == 200
            await anext(reply.aiter_bytes())
        await asyncio.wait_for(generator.closed.wait(), 5)
    assert generator.live == {}


@BOTH
async def test_a_closed_connection_aborts_a_request_that_waits(http: Literal["h11", "httptools"]) -> None:
    generator = FakeGenerator(stall(2))
    async with serve(generator, http) as address:
        async with httpx.AsyncClient(base_url=address) as client:
            with pytest.raises(httpx.ReadTimeout):
                await client.post(CHAT, json=chat(), timeout=httpx.Timeout(5, read=0.2))
        await asyncio.wait_for(generator.closed.wait(), 5)
    assert generator.live == {}


async def test_an_abort_is_counted_as_one() -> None:
    generator = FakeGenerator(stall(2))
    async with serve(generator) as address, httpx.AsyncClient(base_url=address) as client:
        async with client.stream("POST", CHAT, json=chat(stream=True)) as reply:
            await anext(reply.aiter_bytes())
        await asyncio.wait_for(generator.closed.wait(), 5)
        text = (await client.get("/metrics")).text
    assert 'vllm:request_success_total{finished_reason="abort",model_name="tiny/bytes"} 1.0' in text


async def test_one_failed_request_leaves_the_others_alone() -> None:
    generator = FakeGenerator(stall(1))
    waiting = Client(json.dumps(chat()).encode())
    posting = asyncio.create_task(waiting.post(generator))
    await generator.started.wait()
    generator.script = fail(RuntimeError("odd"))
    async with make_client(generator) as client:
        assert (await client.post(CHAT, json=chat())).status_code == 500
    assert len(generator.live) == 1
    waiting.gone.set()
    await posting
