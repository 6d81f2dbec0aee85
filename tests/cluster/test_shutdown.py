"""How a gateway ends: what is in progress may finish, nobody new comes in, and what takes too long is told so."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import httpx
import pytest

from cluster.guard import processes_of
from tests.cluster.harness import LocalCluster, local_cluster
from tests.cluster.hostile import CHAT, COMPLETIONS, chat, completion
from tests.cluster.tiny_model import NAME, write_tiny_model

PATIENCE_S = 60.0
MANY = 3000  # tokens: half a minute at best
SOME = 300


def started(folder: Path, drain_s: float) -> AbstractAsyncContextManager[LocalCluster]:
    model = str(write_tiny_model(folder / NAME))
    return local_cluster({"model.name": model, "engine.runner": "thread", "router.drain_s": drain_s})


def client_of(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=PATIENCE_S)


@asynccontextmanager
async def streaming(client: httpx.AsyncClient, max_tokens: int) -> AsyncIterator[asyncio.Task[list[str]]]:
    """A stream that has begun; its task gives the data of all its events."""
    has_begun = asyncio.Event()

    async def read() -> list[str]:
        body = completion(stream=True, max_tokens=max_tokens, ignore_eos=True, seed=1, logprobs=0)
        data: list[str] = []
        async with client.stream("POST", COMPLETIONS, json=body) as reply:
            assert reply.status_code == 200
            async for line in reply.aiter_lines():
                data += [line.removeprefix("data: ")] if line else []
                has_begun.set()
        return data

    task = asyncio.create_task(read())
    async with asyncio.timeout(PATIENCE_S):
        await has_begun.wait()
        yield task
    await task


def num_tokens(data: list[str]) -> int:
    events = [json.loads(one) for one in data if one != "[DONE]"]
    return sum(len(one["choices"][0]["logprobs"]["tokens"]) for one in events if one["choices"][0]["logprobs"])


async def test_a_gateway_without_requests_ends_at_once(tmp_path: Path) -> None:
    async with started(tmp_path, drain_s=1000.0) as cluster, client_of(cluster.url) as client:
        assert (await client.get("/health")).status_code == 200
        async with asyncio.timeout(10):
            await cluster.gateway.stop()


async def test_a_stream_in_progress_ends_complete_and_nobody_new_comes_in(tmp_path: Path) -> None:
    async with (
        started(tmp_path, drain_s=PATIENCE_S) as cluster,
        client_of(cluster.url) as client,
        client_of(cluster.url) as open_before,
        client_of(cluster.url) as new,
    ):
        assert (await open_before.get("/health")).status_code == 200
        async with streaming(client, SOME) as stream:
            stopping = asyncio.create_task(cluster.gateway.stop())
            await asyncio.sleep(0)
            for one in (open_before, new):
                refused = await one.post(CHAT, json=chat())
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
                assert refused.json()["error"]["code"] == "unavailable"
                health = await one.get("/health")
                assert (health.status_code, health.json()["reason"]) == (503, "shutting down")
            assert not stream.done() and not stopping.done()
            data = await stream
        assert data[-1] == "[DONE]" and num_tokens(data) == SOME
        await stopping
        with pytest.raises(httpx.ConnectError):
            await client.get("/health")


async def test_a_stream_that_takes_longer_ends_with_an_error(tmp_path: Path) -> None:
    async with started(tmp_path, drain_s=0.2) as cluster, client_of(cluster.url) as client:
        async with streaming(client, MANY) as stream:
            await cluster.gateway.stop()
            *tokens, last = await stream
        assert json.loads(last)["error"]["code"] == "unavailable"
        assert 0 < num_tokens(tokens) < MANY


# --- the whole cluster ----------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(("drain_s", "max_tokens"), [(40.0, SOME), (0.5, MANY)])
async def test_ctrl_c_drains_and_leaves_no_process(tmp_path: Path, drain_s: float, max_tokens: int) -> None:
    config = tmp_path / "c.yaml"
    model = write_tiny_model(tmp_path / NAME)
    config.write_text(f"model: {{name: {model}}}\nrouter: {{port: 0, drain_s: {drain_s}}}\ncluster: {{name: drain}}\n")
    output = tmp_path / "output.txt"
    with output.open("w") as file:
        command = (sys.executable, "-m", "cluster", "serve", str(config))
        environ = os.environ | {"NO_COLOR": "1", "COLUMNS": "1000"}
        serving = await asyncio.create_subprocess_exec(
            *command, stdout=file, stderr=file, env=environ, start_new_session=True
        )
    try:
        url = await _printed(output, serving)
        folders = ray_folders(serving.pid)
        async with client_of(url) as client, client_of(url) as other, streaming(client, max_tokens) as stream:
            serving.send_signal(signal.SIGINT)
            refused = await _refusal(other)
            assert refused.json()["error"]["code"] == "unavailable" and refused.headers["retry-after"] == "1"
            data = await stream
        if max_tokens == SOME:
            assert data[-1] == "[DONE]" and num_tokens(data) == SOME
        else:
            assert json.loads(data[-1])["error"]["code"] == "unavailable"
        async with asyncio.timeout(PATIENCE_S):
            assert await serving.wait() == 0
        assert folders and not any(folder.exists() for folder in folders)
        assert not any(list(processes_of(str(folder))) for folder in folders)
    finally:
        if serving.returncode is None:
            serving.kill()
            await serving.wait()


async def _printed(output: Path, serving: asyncio.subprocess.Process) -> str:
    async with asyncio.timeout(120):
        while not (found := re.search(r"URL +(http://[\d.:]+)/v1", text := output.read_text())):  # noqa: ASYNC240
            assert serving.returncode is None, text
            await asyncio.sleep(0.1)
    return found[1]


async def _refusal(client: httpx.AsyncClient) -> httpx.Response:
    """The first answer to a new request that is a 503: the signal takes a moment to reach the gateway."""
    async with asyncio.timeout(PATIENCE_S):
        while (reply := await client.post(CHAT, json=chat(max_tokens=1))).status_code != 503:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return reply


def ray_folders(driver: int) -> list[Path]:
    """Of the local Ray that this process started: its guard is told the folder and the process."""
    commands = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            commands.append(Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1])
        except OSError:
            continue  # it has ended
    return [Path(words[-2]) for words in commands if words[-1:] == [str(driver)] and words[-3].endswith("guard.py")]
