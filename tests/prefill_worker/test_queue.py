from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import Overloaded
from engine.types import EngineStats, Key, Request, SamplingParams, Service, Submission
from prefill_worker.queue import Given, PrefillQueue, QueueRules

EMPTY = EngineStats(num_blocks=100)
NOTHING = Given()
STEP = 512
RULES = QueueRules(oldest_every=1000)


def submission(
    name: str, ttft_s: float = 10.0, num_tokens: int = 3, tenant: str = "", priority: int = 0, timeout_s: float = 600.0
) -> Submission:
    service = Service(tenant, priority, ttft_s)
    request = Request(name, tuple(range(num_tokens)), SamplingParams(), timeout_s=timeout_s, service=service)
    return Submission(request, "g0", None)


def push(queue: PrefillQueue, one: Submission, now: float = 0.0, compute_s: float = 0.0) -> None:
    queue.push(queue.waiting(one, now, compute_s))


def pop(
    queue: PrefillQueue, stats: EngineStats = EMPTY, has: Given = NOTHING, now: float = 0.0, step_tokens: int = STEP
) -> str | None:
    waiting = queue.pop_ready(stats, has, now, step_tokens)
    return None if waiting is None else waiting.submission.request.request_id


def queue_of(*submissions: Submission, rules: QueueRules = RULES) -> PrefillQueue:
    queue = PrefillQueue(rules)
    for each in submissions:
        push(queue, each)
    return queue


# --- order ----------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(50, 99), st.integers(0, 20)), max_size=30))
def test_the_earliest_deadline_goes_first_and_equal_ones_as_they_came(arrivals: list[tuple[int, int, int]]) -> None:
    queue = PrefillQueue(RULES)
    for index, (now, ttft_s, compute_s) in enumerate(arrivals):
        push(queue, submission(str(index), ttft_s), float(now), float(compute_s))
    dues = [now + ttft_s for now, ttft_s, _ in arrivals]
    wanted = sorted(range(len(arrivals)), key=lambda index: (dues[index], index))
    assert [pop(queue) for _ in arrivals] == [str(index) for index in wanted]
    assert pop(queue) is None


def test_without_a_target_age_counts() -> None:
    queue = PrefillQueue(replace(RULES, default_ttft_s=2.0))
    push(queue, submission("plain", math.inf), now=0.0)
    push(queue, submission("sooner", 1.5), now=0.0)
    push(queue, submission("later", 1.5), now=1.0)
    assert [pop(queue, now=1.2) for _ in range(3)] == ["sooner", "plain", "later"]


def test_what_can_no_longer_come_in_time_goes_behind_what_can() -> None:
    queue = queue_of(submission("lost", 1.0), submission("plain", math.inf), submission("urgent", 5.0))
    assert [pop(queue, now=4.0) for _ in range(3)] == ["plain", "urgent", "lost"]


def test_a_higher_priority_number_yields_but_for_the_turn_of_the_oldest() -> None:
    queue = queue_of(submission("batch", 1.0, priority=5), rules=QueueRules(oldest_every=3))
    for index in range(6):
        push(queue, submission(str(index), 10.0 + index))
    assert [pop(queue) for _ in range(7)] == ["0", "1", "batch", "2", "3", "4", "5"]


arrivals = st.lists(st.tuples(st.integers(0, 3), st.floats(0.01, 30.0), st.integers(1, 900)), min_size=1, max_size=12)


@given(st.lists(arrivals, min_size=8, max_size=25), st.integers(2, 6))
def test_nobody_waits_for_ever(rounds: list[list[tuple[int, float, int]]], every: int) -> None:
    """Who has m older ones before it starts within (m + 1) turns of the oldest, whoever comes, however urgent."""
    queue, number = PrefillQueue(QueueRules(oldest_every=every)), 0
    latest: dict[str, int] = {}  # the start by which it must have had its turn
    for starts, comes in enumerate(rounds):
        for priority, ttft_s, num_tokens in comes:
            latest[str(number)] = starts + every * (len(queue) + 1)
            push(queue, submission(str(number), ttft_s, num_tokens, priority=priority), now=float(starts))
            number += 1
        started = pop(queue, now=float(starts))
        assert started is not None
        latest.pop(started)
        assert all(limit > starts for limit in latest.values())


def test_the_oldest_keeps_its_turn_while_another_long_prompt_is_computed() -> None:
    long = submission("long", num_tokens=1000, ttft_s=100.0)
    queue = queue_of(long, *(submission(str(index), 1.0) for index in range(6)), rules=QueueRules(oldest_every=2))
    busy = Given(num=1, has_long=True)
    assert [pop(queue, has=busy) for _ in range(3)] == ["0", "1", "2"]
    assert pop(queue) == "long"


# --- tenants --------------------------------------------------------------------------------------------------

LARGEST = 200  # tokens of a prompt
sizes = st.integers(1, LARGEST)


@given(st.lists(st.tuples(sizes, sizes), min_size=60, max_size=60), st.integers(0, 500), st.integers(2, 8))
def test_two_tenants_that_always_wait_are_served_alike(
    prompts: list[tuple[int, int]], fairness_tokens: int, every: int
) -> None:
    queue = PrefillQueue(QueueRules(oldest_every=every, fairness_tokens=fairness_tokens))
    for index, (first, second) in enumerate(prompts):
        push(queue, submission(f"a{index}", ttft_s=1.0, num_tokens=first, tenant="a"))
        push(queue, submission(f"b{index}", ttft_s=9.0, num_tokens=second, tenant="b"))
    served: Counter[str] = Counter()
    waiting = Counter({"a": len(prompts), "b": len(prompts)})
    while all(waiting.values()):
        found = queue.pop_ready(EMPTY, NOTHING, 0.0, STEP)
        assert found is not None
        served[found.tenant] += found.num_tokens
        waiting[found.tenant] -= 1
        assert abs(served["a"] - served["b"]) <= fairness_tokens + LARGEST


def test_generated_tokens_count_for_their_tenant() -> None:
    rules = replace(RULES, fairness_tokens=10, output_weight=2.0)
    queue = queue_of(submission("a", 1.0, tenant="a"), submission("b", 9.0, tenant="b"), rules=rules)
    queue.charge_output("a", 6)
    assert pop(queue) == "b"


def test_who_asked_for_nothing_has_saved_nothing_up() -> None:
    queue = queue_of(rules=replace(RULES, fairness_tokens=100))
    for index in range(10):
        push(queue, submission(f"a{index}", 1.0 + index, num_tokens=100, tenant="a"))
    for _ in range(5):
        pop(queue)
    for index in range(5):
        push(queue, submission(f"b{index}", 20.0, num_tokens=100, tenant="b"))
    assert [pop(queue) for _ in range(6)] == ["a5", "a6", "b0", "a7", "b1", "a8"]


# --- how much the engine is given -----------------------------------------------------------------------------


@pytest.mark.parametrize(("num_held", "starts"), [(0, True), (30, True), (31, False), (100, False)])
def test_nothing_starts_while_unclaimed_blocks_exceed_the_outboxs_share(num_held: int, starts: bool) -> None:
    queue = queue_of(submission("a"))
    assert (pop(queue, EngineStats(num_blocks=100, num_held_blocks=num_held)) == "a") is starts
    assert len(queue) == (0 if starts else 1)


@pytest.mark.parametrize(
    ("has", "num_tokens", "starts"),
    [
        (Given(), 200, True),
        (Given(1, 100), 100, True),
        (Given(1, 101), 100, False),  # two steps of 100 are full
        (Given(1, 200), 1, False),
        (Given(64), 1, False),  # seats
        (Given(1, 0, has_long=True), 100, True),  # beside it
        (Given(1, 0, has_long=True), 1000, False),
        (Given(1, 100), 1000, True),
        (Given(1, 101), 1000, False),
    ],
)
def test_the_engine_gets_two_steps_of_short_prompts_and_one_long_one(has: Given, num_tokens: int, starts: bool) -> None:
    assert (pop(queue_of(submission("a", num_tokens=num_tokens)), has=has, step_tokens=100) == "a") is starts


def test_short_prompts_pass_a_long_one_whose_turn_it_is_while_there_is_another() -> None:
    queue = queue_of(submission("long", 1.0, num_tokens=1000), submission("short", 9.0))
    assert pop(queue, has=Given(1, 0, has_long=True)) == "short"
    assert pop(queue) == "long"


def test_a_later_short_prompt_passes_a_long_one_only_as_far_as_that_comes_in_time() -> None:
    """Each takes a second; the engine is busy for one."""
    busy = Given(1, 0, has_long=True, left_s=1.0)
    for ttft_s, passes in ((2.5, False), (3.5, True)):
        queue = PrefillQueue(RULES)
        push(queue, submission("long", ttft_s, num_tokens=1000), 0.0, 1.0)
        push(queue, submission("short", 9.0), 0.0, 1.0)
        assert (pop(queue, has=busy) == "short") is passes


@pytest.mark.parametrize(("slack_s", "starts"), [(0.9, False), (1.1, True)])
def test_nothing_joins_what_it_would_make_late(slack_s: float, starts: bool) -> None:
    queue = PrefillQueue(RULES)
    push(queue, submission("a"), 0.0, 1.0)
    assert (pop(queue, has=Given(1, 10, slack_s=slack_s)) == "a") is starts


# --- bounds ---------------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    queue = queue_of(submission("a"), submission("b"), rules=replace(RULES, max_queue=2))
    with pytest.raises(Overloaded) as caught:
        push(queue, submission("c"))
    assert caught.value.retry_after_s
    assert len(queue) == 2


def test_what_is_removed_never_starts_and_the_order_of_the_others_stays() -> None:
    queue = queue_of(*(submission(str(index), 10.0 - index) for index in range(6)))
    assert queue.remove(Key("4", 0))
    assert not queue.remove(Key("4", 0))
    assert not queue.remove(Key("5", 1))
    assert [pop(queue) for _ in range(6)] == ["5", "3", "2", "1", "0", None]


def test_the_queue_knows_what_waits_and_what_goes_before_another() -> None:
    queue = PrefillQueue(RULES)
    push(queue, submission("a", 5.0, num_tokens=3), compute_s=1.0)
    push(queue, submission("b", 9.0, num_tokens=5), compute_s=2.0)
    assert (queue.totals.num_tokens, queue.totals.compute_s) == (8, 3.0)
    assert queue.before_s(queue.waiting(submission("c", 8.0), 0.0, 1.5), 0.0) == 1.0
    assert queue.before_s(queue.waiting(submission("c", 8.0, priority=1), 0.0, 1.5), 0.0) == 3.0
    pop(queue)
    assert (queue.totals.num_tokens, queue.totals.compute_s) == (5, 2.0)
