"""Waits for clients are bounded, whoever serves the application."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest
from starlette.types import Message

from router.patience import HANG_UP
from tests.router.fakes import CHAT, PLAIN_STYLE, FakeGenerator, chat, make_app, make_client, stall

BODY = json.dumps(chat(stream=True)).encode()


class Connection:
    """The server's side of one POST whose body comes in `parts`; its client takes `num_taken` messages, then none."""

    def __init__(self, *parts: bytes, more: bool = False, num_taken: int = 1000) -> None:
        self.sent: list[Message] = []
        self.dropped = asyncio.Event()
        self._messages: list[Message] = [
            {"type": "http.request", "body": part, "more_body": more or part is not parts[-1]} for part in parts
        ]
        self._num_taken = num_taken

    async def receive(self) -> Message:
        if self._messages:
            return self._messages.pop(0)
        await self.dropped.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if len(self.sent) >= self._num_taken:
            await self.dropped.wait()
            return
        self.sent.append(message)

    async def post(self, generator: FakeGenerator, path: str = CHAT, **settings: float) -> None:
        scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": path}
        scope |= {"raw_path": path.encode(), "root_path": "", "query_string": b"", "headers": [], "scheme": "http"}
        scope |= {"extensions": {HANG_UP: {"call": self.dropped.set}}}
        async with asyncio.timeout(20):
            await make_app(generator, PLAIN_STYLE, **settings)(scope, self.receive, self.send)

    def error(self) -> tuple[int, dict[bytes, bytes], dict]:
        start, body = self.sent
        return start["status"], dict(start["headers"]), json.loads(body["body"])["error"]


@pytest.mark.parametrize("parts", [(), (BODY[:5],), (BODY[:5], BODY[5:9])])
async def test_a_body_that_does_not_arrive_gets_a_408_and_its_connection_is_closed(parts: tuple[bytes, ...]) -> None:
    connection, generator = Connection(*parts, more=True), FakeGenerator()
    await connection.post(generator, read_timeout_s=0.05)
    status, headers, error = connection.error()
    assert (status, headers[b"connection"]) == (408, b"close")
    assert (error["type"], error["code"]) == ("invalid_request_error", "request_timeout")
    assert generator.requests == []


async def test_a_body_that_arrives_in_time_is_answered_however_long_the_answer_takes() -> None:
    generator = FakeGenerator(stall(2))
    connection = Connection(BODY)
    posting = asyncio.create_task(connection.post(generator, read_timeout_s=0.5))
    await asyncio.sleep(1.0)
    assert not posting.done() and len(generator.live) == 1
    connection.dropped.set()
    await posting


@pytest.mark.parametrize("num_taken", [0, 1])
async def test_a_client_that_takes_nothing_is_let_go(num_taken: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "router")
    generator = FakeGenerator(stall(1))
    connection = Connection(BODY, num_taken=num_taken)
    await connection.post(generator, write_timeout_s=0.05)
    assert connection.dropped.is_set() and generator.live == {}
    assert any("r1: the client took nothing for 0.05 s" in record.getMessage() for record in caplog.records)
    assert all(record.levelno < logging.ERROR for record in caplog.records)


async def test_a_client_that_took_all_that_there_was_is_waited_for() -> None:
    generator = FakeGenerator(stall(1))
    connection = Connection(BODY, num_taken=2)
    posting = asyncio.create_task(connection.post(generator, write_timeout_s=0.05))
    await asyncio.sleep(0.15)
    assert not posting.done()
    connection.dropped.set()
    await posting


async def test_clients_that_are_let_go_are_counted() -> None:
    generator = FakeGenerator(stall(1))
    async with make_client(generator) as client:
        assert "steelyard_clients_let_go_total" in (await client.get("/metrics")).text
