"""Hostile requests against a real gateway with real workers, beside clients who behave: nothing of theirs changes.

What each request gets is judged by the table in hostile.py. Afterwards nothing is held anywhere.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.cluster.harness import LocalCluster, local_cluster
from tests.cluster.hostile import COMPLETIONS, MAX_BODY_BYTES, Attack, Outcome, attacks
from tests.cluster.serving import connect, send
from tests.cluster.test_served_model import Served, wait_until
from tests.cluster.tiny_model import NAME, write_tiny_model
from tests.oracle.test_accounting import refresh, settled

pytestmark = pytest.mark.slow

AT_ONCE = 32
BOUND_S = 30.0  # for one attack, on a busy machine; the waits of the server are a tenth of it
WAIT_S = 2.0
RECEIVE_BYTES = 4096
NUM_GOOD = 4
SETTINGS: dict[str, object] = {
    "router.read_timeout_s": WAIT_S, "router.write_timeout_s": WAIT_S, "router.max_body_bytes": MAX_BODY_BYTES,
    "engine.num_blocks": 2048, "engine.host_tier_bytes": 0, "engine.runner": "thread",
}  # fmt: skip


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[LocalCluster]:
    folder = write_tiny_model(tmp_path / NAME)
    async with local_cluster({"model.name": str(folder), **SETTINGS}) as started:
        yield started


# --- the clients ----------------------------------------------------------------------------------------------


async def good_stream(client: httpx.AsyncClient, seed: int) -> list[float]:
    """A seeded stream's logprobs, one for each token: other tokens have others."""
    body = {"model": NAME, "prompt": f"story {seed}", "seed": seed, "temperature": 0.9, "max_tokens": 40}
    body |= {"ignore_eos": True, "logprobs": 0, "stream": True}
    reply = await client.post(COMPLETIONS, json=body)
    assert reply.status_code == 200 and reply.text.endswith("data: [DONE]\n\n"), reply.text[-500:]
    events = [json.loads(line[6:]) for line in reply.text.split("\n\n") if line.startswith("data: {")]
    scored = [choice["logprobs"] for event in events for choice in event["choices"] if choice["logprobs"]]
    return [logprob for one in scored for logprob in one["token_logprobs"]]


async def attack(port: int, one: Attack) -> str:
    """Do it; returns what is wrong with what came of it, or nothing."""
    sits = one.outcome is Outcome.SAT_OUT
    try:
        async with asyncio.timeout(BOUND_S), connect(port, RECEIVE_BYTES if sits else None) as client:
            await send(client, one.data)
            if one.half_close:
                client.shutdown(socket.SHUT_WR)
            if one.outcome is Outcome.LEFT:
                await read(client, lambda received: len(received) >= one.reads)
                return ""
            if sits:
                await reset(client)
                return ""
            received = await read(client, whole_answer if one.outcome is Outcome.REFUSED else never)
    except TimeoutError:
        return "nothing came of it"
    return judge(one, received)


async def reset(client: socket.socket) -> None:
    """Returns when the server has dropped the connection, without reading from it."""
    while not client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):  # noqa: ASYNC110 (it would be readable at once)
        await asyncio.sleep(0.1)


async def read(client: socket.socket, enough: Callable[[bytearray], bool]) -> bytes:
    """What comes until it is enough, or until the server closes."""
    loop, received = asyncio.get_running_loop(), bytearray()
    try:
        while not enough(received) and (chunk := await loop.sock_recv(client, 2**16)):
            received += chunk
    except ConnectionError:
        pass  # it closed with some of our bytes unread
    return bytes(received)


def never(_received: bytearray) -> bool:
    return False


def whole_answer(received: bytearray) -> bool:
    head, mark, body = bytes(received).lower().partition(b"\r\n\r\n")
    length = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
    return bool(mark) and len(body) >= int(length or 0)


def judge(one: Attack, received: bytes) -> str:
    if b"HTTP/1.1 5" in received or b'"server_error"' in received:
        return f"a fault of ours: {received[:300]!r}"
    if one.outcome is Outcome.BESIDE:
        return "" if b"HTTP/1.1 200 " in received or b"HTTP/1.1 4" in received else f"no answer: {received[:300]!r}"
    if not received:
        return "" if one.outcome is Outcome.BROKEN else "no answer"
    head, _, body = received.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    if not 400 <= status < 500:
        return f"it was taken: {received[:300]!r}"
    try:
        error = json.JSONDecoder().raw_decode(body.decode())[0]["error"]  # another answer may follow
    except (ValueError, KeyError):
        return f"not OpenAI's format: {received[:300]!r}"
    if set(error) != {"message", "type", "param", "code"} or len(error["message"]) > 600:
        return f"not OpenAI's format: {error}"
    if one.outcome is Outcome.REFUSED:
        named = error["param"] == one.param or (one.param and (error["param"] or "").startswith(one.param + "."))
        return "" if named and status == one.status else f"{status} {error}, not {one.status} of {one.param!r}"
    return ""


# --- the test -------------------------------------------------------------------------------------------------


async def test_hostile_requests_are_refused_and_disturb_nobody(
    cluster: LocalCluster, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tasks_before = await assail(cluster.url)
    await refresh(cluster)
    assert await settled(cluster) == {}
    assert all(view.num_leaked_blocks == 0 for view in cluster.dispatcher.health().workers)
    await nothing_is_left(cluster, tasks_before)
    records = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert not records, [record.getMessage() for record in records[:5]]
    assert any("took nothing" in record.getMessage() for record in caplog.records)


@pytest.mark.ray
def test_the_same_of_a_served_cluster(tmp_path: Path) -> None:
    """`steelyard serve` on Ray: the gateway, the workers and their engines in processes of their own."""
    values = yaml.safe_load(Path("configs/local.yaml").read_text())
    settings = SETTINGS | {"model.name": str(write_tiny_model(tmp_path / NAME)), "engine.runner": "process"}
    for key, value in settings.items():
        part, _, name = key.partition(".")
        values[part][name] = value
    config = tmp_path / "hostile.yaml"
    config.write_text(yaml.safe_dump(values))
    served = Served(tmp_path, str(config))
    try:
        asyncio.run(assail(served.url))
        wait_until(lambda: is_quiet(httpx.get(f"{served.url}/health").json()))
    finally:
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(60) == 0


def is_quiet(health: dict[str, Any]) -> bool:
    """Nothing is held by any worker or live at the gateway, and nothing leaked."""
    workers = health["workers"]
    assert len(workers) == 2 and all(worker["connected"] for worker in workers)
    assert all(worker["num_leaked_blocks"] == 0 for worker in workers)
    held = [worker["num_blocks"] - worker["num_free_blocks"] for worker in workers]
    return health["num_live_requests"] == 0 and not any(held)


async def assail(url: str) -> Counter[str]:
    """All attacks, beside streams that must not change. Returns the tasks there were before."""
    port = int(url.rpartition(":")[2])
    table = attacks()
    assert len(table) >= 500
    places = asyncio.Semaphore(AT_ONCE)

    async def attack_when_there_is_room(one: Attack) -> str:
        async with places:
            return await attack(port, one)

    async with httpx.AsyncClient(base_url=url, timeout=BOUND_S) as client:
        undisturbed = [await good_stream(client, seed) for seed in range(NUM_GOOD)]
        assert all(len(tokens) == 40 for tokens in undisturbed)
        tasks_before = names_of_tasks()
        attacking = asyncio.ensure_future(asyncio.gather(*map(attack_when_there_is_room, table)))

        async def behave(seed: int) -> int:
            num_streams = 0
            while not attacking.done():
                assert await good_stream(client, seed) == undisturbed[seed], seed
                num_streams += 1
            return num_streams

        num_streams = await asyncio.gather(*map(behave, range(NUM_GOOD)))
        faults = [
            (one.family, one.data[:160], fault) for one, fault in zip(table, await attacking, strict=True) if fault
        ]
        assert not faults, "\n".join(map(str, [len(faults), *faults]))
        assert min(num_streams) > 1
        assert [await good_stream(client, seed) for seed in range(NUM_GOOD)] == undisturbed
    return tasks_before


def names_of_tasks() -> Counter[str]:
    """All tasks of this process's loop but our own, by what they run."""
    mine = asyncio.current_task()
    return Counter(getattr(one.get_coro(), "__qualname__", "?") for one in asyncio.all_tasks() if one is not mine)


async def nothing_is_left(cluster: LocalCluster, tasks_before: Counter[str]) -> None:
    """No connection, no task of an HTTP request, and no task that was not there before."""
    assert cluster.gateway._server is not None
    state = cluster.gateway._server.server_state

    def left() -> list[object]:
        return [*state.connections, *state.tasks, *(names_of_tasks() - tasks_before)]

    deadline = asyncio.get_running_loop().time() + BOUND_S
    while left() and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110 (these tables have no event)
        await asyncio.sleep(0.05)
    assert left() == []
