"""What one worker does for its targets: chunks within the slack of its streams, a fair order, a last word."""

from __future__ import annotations

import asyncio
import math

import pytest

from engine.errors import Overloaded
from engine.types import Service
from tests.cluster.one_worker import STEPS, OneWorker, on_one_worker

TPOT_S = 0.009
PROMPTS = [f"prompt {number}" for number in range(50)]
STREAMS = [f"stream {number}" for number in range(4)]


def streams_and_a_burst(tpot_s: float, before_s: float = 0.2) -> OneWorker:
    """Streams decode, and then come prompts for as long as they last."""

    async def act(one: OneWorker) -> None:
        for name in STREAMS:
            one.submit(name, 100, 200, Service(tpot_s=tpot_s))
        await asyncio.sleep(before_s)
        for name in PROMPTS:
            one.submit(name, 1000, 2)
        await asyncio.sleep(60.0)

    return on_one_worker(act)


def test_a_burst_of_prompts_does_not_push_tpot_beyond_its_target_and_they_all_progress() -> None:
    one = streams_and_a_burst(TPOT_S)
    assert max(map(one.tpot_s, STREAMS)) <= TPOT_S
    gaps = [
        after - before for name in STREAMS for before, after in zip(one.times[name], one.times[name][1:], strict=False)
    ]
    assert max(gaps) <= 2 * TPOT_S, "no step takes more than twice the target"
    assert all(len(one.times[name]) == 2 for name in PROMPTS)
    free = streams_and_a_burst(math.inf)
    assert max(map(free.tpot_s, STREAMS)) > 1.1 * TPOT_S, "they are in the way of each other"


def test_prompts_progress_beside_a_pace_that_cannot_be_kept() -> None:
    one = streams_and_a_burst(0.001)
    assert all(len(one.times[name]) == 2 for name in PROMPTS)


@pytest.mark.parametrize("tpot_s", [0.001, 0.012])
def test_chunks_do_not_change_tokens(tpot_s: float) -> None:
    async def act(one: OneWorker) -> None:
        requests = [one.submit(f"r{index}", 40 + 60 * index, 25, Service(tpot_s=tpot_s)) for index in range(6)]
        await asyncio.sleep(0.05)
        requests += [one.submit(f"late {index}", 300, 5) for index in range(3)]
        await asyncio.sleep(30.0)
        for request in requests:
            assert tuple(one.tokens[request.request_id]) == one.world.spec.weights.continuation(request)

    on_one_worker(act, plain=False)


# --- order ----------------------------------------------------------------------------------------------------


def flooded(fairness_tokens: int) -> float:
    """Somebody's TTFT behind 150 prompts of another, 200 tokens each."""

    async def act(one: OneWorker) -> None:
        for number in range(150):
            one.submit(f"flood {number}", 200, 1, Service("flood", ttft_s=30.0))
        await asyncio.sleep(0.1)
        one.submit("other", 200, 1, Service("other", ttft_s=30.0))
        await asyncio.sleep(30.0)

    return on_one_worker(act, prefill={"fairness_tokens": fairness_tokens}).ttft_s("other")


def test_a_flood_of_one_tenant_does_not_make_another_wait() -> None:
    """For what the engine has, what a tenant may be ahead by, the turns of the oldest meanwhile, and its own prompt."""
    token_s, backlog, fairness_tokens = STEPS.prefill_token_s, 3 * 512, 1000
    most_tokens = (backlog + fairness_tokens + 200) * 8 / 7 + 200
    assert flooded(fairness_tokens) <= 1.2 * most_tokens * token_s
    assert flooded(10**9) > 1.2, "without the counters"


def test_short_prompts_are_not_stuck_behind_long_ones() -> None:
    async def act(one: OneWorker) -> None:
        for number in range(10):
            one.submit(f"long {number}", 6000, 1, Service(ttft_s=30.0))  # 0.3 s each
        await asyncio.sleep(0.05)
        for number in range(5):
            one.submit(f"short {number}", 50, 1, Service(ttft_s=1.0))
        await asyncio.sleep(30.0)

    one = on_one_worker(act)
    assert max(one.ttft_s(f"short {number}") for number in range(5)) < 0.06, "two steps"
    assert all(one.times[f"long {number}"] for number in range(10))


# --- the last word --------------------------------------------------------------------------------------------


def test_what_the_queue_makes_late_is_refused_and_says_when_to_come_back() -> None:
    async def act(one: OneWorker) -> None:
        one.submit("first", 4000, 1)
        await asyncio.sleep(2.0)
        for number in range(5):
            one.submit(f"before {number}", 4000, 1, Service(ttft_s=10.0))  # 0.2 s each
        with pytest.raises(Overloaded) as caught:
            one.submit("late", 4000, 1, Service(ttft_s=0.3))
        assert caught.value.retry_after_s is not None
        one.submit("plain", 4000, 1)
        await asyncio.sleep(caught.value.retry_after_s)
        one.submit("comes back", 4000, 1, Service(ttft_s=0.3))
        await asyncio.sleep(30.0)
        assert one.ttft_s("comes back") <= 0.3
        assert one.times["plain"]

    on_one_worker(act)


def test_a_worker_reports_its_queue_and_its_slack() -> None:
    async def act(one: OneWorker) -> None:
        for name in STREAMS:
            one.submit(name, 100, 800, Service(tpot_s=TPOT_S))
        await asyncio.sleep(1.0)
        one.submit("learnt from", 1000, 1)
        await asyncio.sleep(1.0)
        for number in range(20):
            one.submit(f"r{number}", 1000, 1)
        await asyncio.sleep(0.1)
        stats, now = one.worker.sides.status().stats, one.world.now
        assert 16 <= stats.slack_tokens <= 256
        await asyncio.sleep(30.0)
        took_s = max(one.times[f"r{number}"][0] for number in range(20)) - now
        assert stats.queued_s == pytest.approx(took_s, rel=0.3)
        assert stats.num_queued_tokens >= 15_000

    on_one_worker(act)
