"""A cluster gives the oracle's tokens, and sampled streams are the same alone, in a batch and across the wire.

One prefill and one decode worker, each with its engine in a process of its own, and real gRPC and HTTP between.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Sequence

import httpx
import pytest
import pytest_asyncio

from engine.step_runner import ProcessStepRunner
from engine.types import Request, Role, SamplingParams
from tests.cluster.harness import LocalCluster, local_cluster
from tests.oracle.clients import check_cluster, collect, connected
from tests.oracle.combinations import Case, Combination, Tally, lab, run
from tests.oracle.prompts import MODEL, oracle_prompts, tokenizer
from tests.oracle.reference import golden

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

SEEDS = (7, 2**63 + 11)
NUM_SAMPLED = 24
ALONE = Combination(chunk=256, batch=1, prefix_cache=True, shuffled=False, block_size=16)
BATCHED = Combination(chunk=64, batch=16, prefix_cache=True, shuffled=True, block_size=16)
KILL_AT = 8  # tokens of the slowest stream


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster() -> AsyncIterator[LocalCluster]:
    async with local_cluster() as started:
        yield started


@pytest.fixture(scope="module")
def sampled_alone() -> dict[str, tuple[int, ...]]:
    """Each stream by itself in one engine of this process, with as many threads as a worker's engine has."""
    alone = {request.request_id: _run(ALONE, [request])[request.request_id] for request in sampled_requests()}
    batched = _run(BATCHED, [*sampled_requests(), *others()])
    assert {name: batched[name] for name in alone} == alone, "alone and in a batch"
    return alone


def sampled_requests() -> list[Request]:
    """Two prompts for each seed."""
    return [
        Request(f"seed {seed}, prompt {index}", oracle_prompts(8)[index].ids, sampled(seed))
        for seed in SEEDS
        for index in (2, 4)
    ]


def sampled(seed: int) -> SamplingParams:
    return SamplingParams(NUM_SAMPLED, temperature=0.8, top_p=0.9, top_k=50, seed=seed, ignore_eos=True)


def others() -> list[Request]:
    """Company of other lengths and other ways of sampling."""
    short = [prompt for prompt in oracle_prompts(40) if len(prompt.ids) < 100]
    return [
        Request(f"other {index}", prompt.ids, SamplingParams(10 + index, temperature=index % 3 / 2, seed=index))
        for index, prompt in enumerate(short[:10])
    ]


def _run(one: Combination, requests: Sequence[Request]) -> dict[str, tuple[int, ...]]:
    engine, model = lab().make(one, 512)
    return {name: result.tokens for name, result in run(engine, model, requests).items()}


# --- greedy ---------------------------------------------------------------------------------------------------


def cases() -> list[Case]:
    return [Case(prompt, golden().expected(prompt.ids)) for prompt in oracle_prompts(8)]


@pytest.mark.parametrize(("at_once", "every"), [(1, 3), (8, 1)])
async def test_cluster_gives_the_oracles_tokens(cluster: LocalCluster, total: Tally, at_once: int, every: int):
    tally = await check_cluster(cluster, cases()[::every], at_once)
    total.add(tally)
    assert not tally.wrong, str(tally)


@pytest.mark.parametrize("stream", [False, True])
async def test_http_gives_the_oracles_text(cluster: LocalCluster, stream: bool):
    prompt = oracle_prompts(8)[3]
    expected = golden().expected(prompt.ids)
    body = {
        "model": MODEL, "prompt": list(prompt.ids), "max_tokens": len(expected.tokens), "temperature": 0,
        "ignore_eos": True, "stream": stream,
    }  # fmt: skip
    async with httpx.AsyncClient(base_url=cluster.url, timeout=60) as client:
        reply = await client.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    text = _streamed_text(reply.text) if stream else reply.json()["choices"][0]["text"]
    assert text == tokenizer().decode(expected.tokens)
    if not stream:
        assert reply.json()["usage"]["completion_tokens"] == len(expected.tokens)


def _streamed_text(events: str) -> str:
    chunks = [line.removeprefix("data: ") for line in events.splitlines() if line.startswith("data: ")]
    assert chunks.pop() == "[DONE]"
    return "".join(choice["text"] for chunk in chunks for choice in json.loads(chunk)["choices"])


# --- sampled --------------------------------------------------------------------------------------------------


async def test_sampled_streams_are_the_same_alone_in_a_batch_and_across_the_wire(
    cluster: LocalCluster, sampled_alone: dict[str, tuple[int, ...]]
):
    requests = [*sampled_requests(), *others()]
    answers = await asyncio.gather(*(collect(cluster.dispatcher, request) for request in requests))
    across = {request.request_id: tokens for request, tokens in zip(requests, answers, strict=True)}
    assert {name: across[name] for name in sampled_alone} == sampled_alone
    assert len({tokens[: NUM_SAMPLED // 2] for tokens in sampled_alone.values()}) == len(sampled_alone), "seeds matter"


async def test_streams_go_on_unchanged_when_their_decode_worker_dies(
    cluster: LocalCluster, sampled_alone: dict[str, tuple[int, ...]]
):
    """Once to another decode worker, and once, with none left, to the prefill worker until a new one is listed."""
    await cluster.start_worker(Role.DECODE, 1)
    await connected(cluster)
    for victim in ("decode-0", "decode-1"):
        logs: dict[str, list[int]] = {request.request_id: [] for request in sampled_requests()}
        streams = [
            asyncio.create_task(collect(cluster.dispatcher, request, logs[request.request_id]))
            for request in sampled_requests()
        ]
        async with asyncio.timeout(60):
            while min(map(len, logs.values())) < KILL_AT:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        served = await _kill(cluster, victim)
        await asyncio.gather(*streams)
        assert {name: tuple(tokens) for name, tokens in logs.items()} == sampled_alone
        assert served, f"no stream was on {victim}"
    await cluster.start_worker(Role.DECODE, 0)
    await connected(cluster)
    tally = await check_cluster(cluster, cases()[:2], at_once=2)
    assert not tally.wrong, str(tally)


async def _kill(cluster: LocalCluster, name: str) -> list[str]:
    """Kill a worker's engine as a crash would; the worker ends and leaves the list. Returns the requests it served."""
    worker = cluster.workers.pop(name)
    runner = worker._runner
    assert isinstance(runner, ProcessStepRunner)
    served = [key.request_id for key in worker._sides.streams._owners]
    os.kill(runner.pid, signal.SIGKILL)
    async with asyncio.timeout(10):
        await worker.failed()
    await worker.stop()
    del cluster.members[name]
    cluster.publish()
    return served
