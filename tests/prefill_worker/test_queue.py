from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import Overloaded
from engine.types import EngineStats, Key, Request, SamplingParams, Submission
from prefill_worker.queue import ENGINE_BACKLOG, PrefillQueue

EMPTY = EngineStats(num_blocks=100)


def submission(name: str, timeout_s: float = 10.0, num_tokens: int = 3) -> Submission:
    return Submission(Request(name, tuple(range(num_tokens)), SamplingParams(), timeout_s=timeout_s), "g0", None)


def pop(queue: PrefillQueue, stats: EngineStats = EMPTY, num_given: int = 0) -> str | None:
    waiting = queue.pop_ready(stats, num_given)
    return None if waiting is None else waiting.submission.request.request_id


def queue_of(*submissions: Submission, max_queue: int = 1024, outbox_fraction: float = 0.3) -> PrefillQueue:
    queue = PrefillQueue(max_queue, outbox_fraction)
    for each in submissions:
        queue.push(each, now=0.0)
    return queue


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=30))
def test_the_earliest_deadline_goes_first_and_equal_ones_as_they_came(arrivals: list[tuple[int, int]]) -> None:
    queue = PrefillQueue(1024, 0.3)
    for index, (now, timeout_s) in enumerate(arrivals):
        queue.push(submission(str(index), timeout_s), float(now))
    wanted = sorted(range(len(arrivals)), key=lambda index: (sum(arrivals[index]), index))
    assert [pop(queue) for _ in arrivals] == [str(index) for index in wanted]
    assert pop(queue) is None


@pytest.mark.parametrize(("num_held", "starts"), [(0, True), (30, True), (31, False), (100, False)])
def test_nothing_starts_while_unclaimed_blocks_exceed_the_outboxs_share(num_held: int, starts: bool) -> None:
    queue = queue_of(submission("a"))
    assert (pop(queue, EngineStats(num_blocks=100, num_held_blocks=num_held)) == "a") is starts
    assert len(queue) == (0 if starts else 1)


@pytest.mark.parametrize(("num_given", "starts"), [(0, True), (ENGINE_BACKLOG - 1, True), (ENGINE_BACKLOG, False)])
def test_the_engine_gets_no_more_than_it_needs_ahead(num_given: int, starts: bool) -> None:
    assert (pop(queue_of(submission("a")), num_given=num_given) == "a") is starts


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    queue = queue_of(submission("a"), submission("b"), max_queue=2)
    with pytest.raises(Overloaded) as caught:
        queue.push(submission("c"), 0.0)
    assert caught.value.retry_after_s
    assert len(queue) == 2


def test_what_is_removed_never_starts_and_the_order_of_the_others_stays() -> None:
    queue = queue_of(*(submission(str(index), timeout_s=10 - index) for index in range(6)))
    assert queue.remove(Key("4", 0))
    assert not queue.remove(Key("4", 0))
    assert not queue.remove(Key("5", 1))
    assert [pop(queue) for _ in range(6)] == ["5", "3", "2", "1", "0", None]


def test_the_queue_knows_how_many_tokens_wait() -> None:
    queue = queue_of(submission("a", num_tokens=3), submission("b", num_tokens=5))
    assert queue.num_tokens == 8
    pop(queue)
    assert queue.num_tokens == 5
