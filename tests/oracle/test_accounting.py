"""After any mix of requests and cancellations nothing is held anywhere; and a leak, planted, is seen.

500 requests in one seeded order, up to 64 at a time, about 30 % of them given up at some moment.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from enum import StrEnum

import httpx
import pytest
import pytest_asyncio

from cluster.spec import WorkerSpec
from cluster.worker import Worker
from engine.block_manager import Holder, HolderKind
from engine.build import build_engine
from engine.engine import Engine
from engine.pool import SharedPool
from engine.setup import EngineSetup
from engine.step_runner import StepRunner, ThreadStepRunner
from engine.types import FinishReason, Key, Request, Role, SamplingParams
from tests.cluster.harness import LocalCluster, local_cluster
from tests.oracle.clients import connected, statuses
from tests.oracle.prompts import own_prompts

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

SEED = 20251122
NUM_REQUESTS = 500
MAX_AT_ONCE = 64
NUM_KINDS = 150  # different requests among them; equal ones must get equal tokens
FOR_MINUTES = 1500  # tokens of some that are given up: nobody could miss that they were not stopped
SETTLED_S = 6.0  # less than a lease's life, so that nothing may wait for one to expire


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster() -> AsyncIterator[LocalCluster]:
    async with local_cluster() as started:
        yield started


# --- the mix --------------------------------------------------------------------------------------------------


class GiveUp(StrEnum):
    NEVER = "never"
    AT_ONCE = "before placement"
    SOON = "in prefill or the hand-off"
    MID_STREAM = "after some tokens"


@dataclass(frozen=True, slots=True)
class Visit:
    """One request and when its client gives up: after `seconds`, or after `num_tokens`."""

    request: Request
    give_up: GiveUp
    seconds: float
    num_tokens: int


def make_visits(seed: int) -> list[Visit]:
    rng = random.Random(seed)
    text = own_prompts(40)[-1].ids
    kinds = [_make_kind(rng, text) for _ in range(NUM_KINDS)]
    return [_make_visit(rng, f"visit {number}", *rng.choice(kinds)) for number in range(NUM_REQUESTS)]


def _make_kind(rng: random.Random, text: tuple[int, ...]) -> tuple[tuple[int, ...], SamplingParams]:
    """A prompt of 5 to 60 tokens, many with a common beginning, and how to go on."""
    length = round(5 * 12 ** rng.random())
    shared = rng.choice((0, 16, 32, 40)) if length > 16 else 0
    first = rng.randrange(100, len(text) - length)
    prompt = (*text[: min(shared, length - 1)], *text[first : first + length])[:length]
    stops = tuple(sorted(set(text))[::3]) if rng.random() < 0.3 else ()  # a third of the usual tokens: an early end
    return prompt, SamplingParams(
        max_tokens=rng.randint(1, 8), temperature=rng.choice((0.0, 1.0)), seed=rng.getrandbits(64), stop_token_ids=stops
    )


def _make_visit(rng: random.Random, name: str, prompt: tuple[int, ...], params: SamplingParams) -> Visit:
    give_up = rng.choices(list(GiveUp), weights=(70, 4, 10, 16))[0]
    if give_up is not GiveUp.NEVER and rng.random() < 0.5:
        params = replace(params, max_tokens=FOR_MINUTES)
    # The first token comes while the blocks are on their way to decode, so many leave just then.
    return Visit(Request(name, prompt, params), give_up, 4 * rng.random() ** 2, rng.choice((1, 1, 1, 2, 3, 6)))


@dataclass(frozen=True, slots=True)
class Ended:
    """How a visit ended: with a finish, or given up."""

    visit: Visit
    tokens: tuple[int, ...]
    finish: FinishReason | None


async def pay(cluster: LocalCluster, visit: Visit) -> Ended:
    """Ask, and leave when the client gives up."""
    tokens: list[int] = []
    patience_s = {GiveUp.AT_ONCE: 0.0, GiveUp.SOON: visit.seconds}.get(visit.give_up)
    try:
        async with asyncio.timeout(patience_s), aclosing(cluster.dispatcher.generate(visit.request)) as outputs:
            async for output in outputs:
                assert output.first_index == len(tokens)
                tokens += output.token_ids
                if output.finish:
                    return Ended(visit, tuple(tokens), output.finish)
                if visit.give_up is GiveUp.MID_STREAM and len(tokens) >= visit.num_tokens:
                    break
    except TimeoutError:
        pass  # the client's own patience
    return Ended(visit, tuple(tokens), None)


# --- what is held ---------------------------------------------------------------------------------------------


async def held(cluster: LocalCluster) -> dict[str, int]:
    """Everything that somebody holds or waits for, by name; empty when all is at rest."""
    found = {"live requests": cluster.dispatcher.health().num_live_requests}
    for name, status in (await statuses(cluster)).items():
        stats, sides = status.stats, cluster.workers[name]._sides
        found |= {
            f"{name} running": stats.num_running, f"{name} waiting": stats.num_waiting, f"{name} held": stats.num_held,
            f"{name} blocks": stats.num_blocks - stats.num_free_blocks, f"{name} leaked": stats.num_leaked_blocks,
            f"{name} queue": status.num_queued, f"{name} leases": status.num_leases, f"{name} pulls": status.num_pulls,
            f"{name} streams": status.num_streams, f"{name} arrivals": len(sides._intake._arrivals),
            f"{name} reservations asked": len(sides._intake.questions._reserving),
            f"{name} prefills": len(sides._prefill._live), f"{name} moves": len(sides._mover._moves),
        }  # fmt: skip
    return {what: amount for what, amount in found.items() if amount}


async def settled(cluster: LocalCluster, leftover: dict[str, int] = {}, timeout_s: float = SETTLED_S) -> dict[str, int]:  # noqa: B006
    """What is held once it is no more than `leftover`, or when the time is up."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while (found := await held(cluster)) != leftover and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    return found


async def refresh(cluster: LocalCluster) -> None:
    """A request more, so that every worker walks its blocks and reports."""
    await pay(cluster, Visit(Request(secrets.token_hex(8), tuple(range(5, 25)), SamplingParams(3)), GiveUp.NEVER, 0, 0))


# --- tests ----------------------------------------------------------------------------------------------------


async def test_after_500_requests_with_cancellations_nothing_is_held(cluster: LocalCluster):
    places = asyncio.Semaphore(MAX_AT_ONCE)

    async def visit_when_there_is_room(visit: Visit) -> Ended:
        async with places:
            return await pay(cluster, visit)

    ended = await asyncio.gather(*map(visit_when_there_is_room, make_visits(SEED)))
    await refresh(cluster)
    assert await settled(cluster) == {}
    _check_endings(ended)
    for status in (await statuses(cluster)).values():
        assert status.stats.num_free_blocks == status.stats.num_blocks and status.stats.num_cached_blocks > 0


def _check_endings(ended: list[Ended]) -> None:
    """Who stayed got an answer, equal ones equal answers; enough of all kinds took place."""
    answers: dict[tuple[tuple[int, ...], SamplingParams], tuple[int, ...]] = {}
    for one in ended:
        params = one.visit.request.sampling
        if one.finish is FinishReason.LENGTH:
            assert len(one.tokens) == params.max_tokens
        elif one.finish is None:
            assert one.visit.give_up is not GiveUp.NEVER
        known = answers.setdefault((one.visit.request.prompt_ids, params), one.tokens)
        longest, shortest = sorted((known, one.tokens), key=len, reverse=True)
        assert longest[: len(shortest)] == shortest, one.visit
        answers[one.visit.request.prompt_ids, params] = longest
    kinds = Counter((one.visit.give_up, one.finish) for one in ended)
    assert kinds[GiveUp.NEVER, FinishReason.LENGTH] > 150 and kinds[GiveUp.NEVER, FinishReason.STOP] > 20, kinds
    assert sum(kinds[why, None] for why in GiveUp) > NUM_REQUESTS // 6, kinds
    assert sum(one.finish is None and bool(one.tokens) for one in ended) > 10, kinds


class OpenWorker(Worker):
    """A worker whose engine, in a thread of this process, a test can reach."""

    engine: Engine

    async def _start_engine(self, setup: EngineSetup) -> tuple[StepRunner, SharedPool | None]:
        pool = SharedPool(setup.layout, setup.spec.num_blocks)
        built = await asyncio.to_thread(build_engine, setup, pool)
        self.engine, self._block_bytes = built.engine, pool
        return ThreadStepRunner(built.engine, built.runner), None


async def test_a_planted_leak_is_seen(cluster: LocalCluster):
    worker = OpenWorker(WorkerSpec("decode-leaky", "1", Role.DECODE, "127.0.0.1"), cluster.config, cluster.secret)
    cluster.members["decode-leaky"] = await worker.start()
    cluster.workers["decode-leaky"] = worker
    del cluster.members["decode-0"]  # so that this one is chosen
    cluster.publish()
    await connected(cluster)
    await refresh(cluster)
    assert await settled(cluster) == {}

    worker.engine.blocks.allocate(Holder(HolderKind.SEQUENCE, Key("nobody", 0)), 3)  # it is idle: its thread waits
    await refresh(cluster)
    leak = {"decode-leaky blocks": 3, "decode-leaky leaked": 3}
    assert await settled(cluster, leak) == leak
    async with httpx.AsyncClient(base_url=cluster.url) as client:
        views = (await client.get("/health")).json()["workers"]
        metrics = (await client.get("/metrics")).text
    assert {view["worker_id"]: view["num_leaked_blocks"] for view in views} == {"prefill-0": 0, "decode-leaky": 3}
    leaks = [line for line in metrics.splitlines() if line.startswith("steelyard_kv_leaked_blocks{")]
    assert sorted(line.split()[-1] for line in leaks) == ["0.0", "3.0"], leaks
