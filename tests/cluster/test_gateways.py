"""Two gateways on one port: both answer, and one that is killed takes nothing with it but its own streams."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from cluster.client import ApiClient
from cluster.gateway import Gateway
from tests.cluster.gateway_process import beside, kill
from tests.cluster.harness import LocalCluster, local_cluster
from tests.cluster.tiny_model import NAME, write_tiny_model
from tests.virtual import until

FIRST, SECOND = "gateway-test", "gateway-second"
NUM_TOKENS = 300
LONG = {
    "prompt": "on and on", "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True,
    "temperature": 0,
}  # fmt: skip
PATIENCE_S = 20.0


async def test_one_of_two_gateways_is_killed_and_the_other_serves_on(tmp_path: Path) -> None:
    overrides = {
        "model.name": str(write_tiny_model(tmp_path / NAME)),
        "router.gateways": 2,
        "decode.orphan_s": 0.2,
        "engine.runner": "thread",
    }
    async with local_cluster(overrides) as cluster, beside(cluster, overrides, SECOND) as process:
        answers = Counter([await who_answers(cluster.url) for _ in range(32)])
        assert min(answers[FIRST], answers[SECOND]) > 0 and len(answers) == 2
        async with client_at(cluster.url, FIRST) as kept, client_at(cluster.url, SECOND) as lost:
            assert f'steelyard_gateway_info{{gateway="{SECOND}"}} 1.0' in (await lost.get("/metrics")).text
            begun = [asyncio.Event(), asyncio.Event()]
            streams = [asyncio.create_task(read(*one)) for one in zip((kept, lost), begun, strict=True)]
            await asyncio.gather(*(event.wait() for event in begun))
            await kill(process)
            idle = await started(cluster)
            assert {await who_answers(cluster.url) for _ in range(16)} == {FIRST}
            with pytest.raises(httpx.HTTPError):
                await streams[1]
            assert await streams[0] == NUM_TOKENS
            await idle.stop()
        await until(lambda: is_empty(cluster), timeout_s=PATIENCE_S)
        assert await asyncio.to_thread(is_healthy, cluster.url)


async def started(cluster: LocalCluster) -> Gateway:
    """Another gateway on the same port that knows of no worker yet, and so gets no connection."""
    router = cluster.config.router.model_copy(update={"port": int(cluster.url.rpartition(":")[2])})
    gateway = Gateway(cluster.config.model_copy(update={"router": router}), cluster.secret, "gateway-idle")
    assert await gateway.start() == cluster.url
    return gateway


def client_of(url: str) -> httpx.AsyncClient:
    """With one connection."""
    limits = httpx.Limits(max_connections=1)
    return httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, trust_env=False, verify=False, limits=limits)


async def who_answers(url: str) -> str:
    """To a new connection."""
    async with client_of(url) as client:
        return (await client.get("/health")).json()["gateway_id"]


@asynccontextmanager
async def client_at(url: str, gateway_id: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client whose connection is with this gateway."""
    for _ in range(100):
        async with client_of(url) as client:
            if (await client.get("/health")).json()["gateway_id"] == gateway_id:
                yield client
                return
    raise AssertionError(f"{gateway_id} got no connection")


async def read(client: httpx.AsyncClient, has_begun: asyncio.Event) -> int:
    """How many tokens came."""
    body = {**LONG, "model": NAME, "max_tokens": NUM_TOKENS}
    lines: list[str] = []
    async with client.stream("POST", "/v1/completions", json=body) as reply:
        assert reply.status_code == 200
        async for line in reply.aiter_lines():
            has_begun.set()
            lines += [line.removeprefix("data: ")] if line else []
    assert lines[-1] == "[DONE]"
    return json.loads(lines[-2])["usage"]["completion_tokens"]


def is_empty(cluster: LocalCluster) -> bool:
    """No worker runs or leaks anything any more."""
    workers = cluster.dispatcher.health().workers
    return not any(one.num_running or one.num_waiting or one.num_leaked_blocks for one in workers)


def is_healthy(url: str) -> bool:
    with ApiClient(url) as client:
        return client.health().healthy
