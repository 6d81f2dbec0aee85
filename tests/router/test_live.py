from __future__ import annotations

import asyncio
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import Overloaded, SteelyardError, WorkerLost
from engine.types import ErrorInfo, FinishReason, Key, TokenOutput
from router.live import LiveRequest
from router.policies.snapshot import Placement
from tests.router.fake_workers import member, request, token
from tests.virtual import in_virtual_time

P, D = member("p0"), member("d0")
PAIR = Placement(P, D)
ALONE = Placement(P, None)


def live_request(placement: Placement = PAIR) -> LiveRequest:
    live = LiveRequest(request(), deadline=100.0)
    live.place(placement)
    return live


async def events(live: LiveRequest) -> list[TokenOutput | SteelyardError]:
    """All that can be had without waiting."""
    found = []
    try:
        while True:
            async with asyncio.timeout(0):
                found.append(await live.next_event())
    except TimeoutError:
        return found


@in_virtual_time
async def test_outputs_in_order_are_delivered_in_order() -> None:
    live = live_request()
    assert live.take(token(live.key, 0), "p0")
    assert not live.handed_off
    assert live.take(token(live.key, 1), "d0")
    assert live.handed_off
    assert live.take(token(live.key, 2, 2, 3, 4, finish=FinishReason.LENGTH), "d0")
    await events(live)
    assert live.tokens == [0, 1, 2, 3, 4]


@in_virtual_time
async def test_a_second_token_that_overtakes_the_first_waits_for_it() -> None:
    live = live_request()
    assert not live.take(token(live.key, 1), "d0")
    assert await events(live) == []
    assert live.take(token(live.key, 0), "p0")
    await events(live)
    assert live.tokens == [0, 1]
    assert live.handed_off


@in_virtual_time
async def test_all_tokens_that_overtake_the_first_wait_for_it() -> None:
    live = live_request()
    for index in range(1, 6):
        live.take(token(live.key, index, finish=FinishReason.LENGTH if index == 5 else None), "d0")
    live.take(token(live.key, 0), "p0")
    found = await events(live)
    assert live.tokens == [0, 1, 2, 3, 4, 5]
    assert isinstance(found[-1], TokenOutput) and found[-1].finish is FinishReason.LENGTH


@in_virtual_time
async def test_only_one_gap_is_held_back() -> None:
    live = live_request()
    live.take(token(live.key, 1), "d0")
    live.take(token(live.key, 3), "d0")
    live.take(token(live.key, 0), "p0")
    await events(live)
    assert live.tokens == [0, 1]
    live.take(token(live.key, 2), "d0")
    live.take(token(live.key, 3), "d0")
    await events(live)
    assert live.tokens == [0, 1, 2, 3]


@in_virtual_time
async def test_duplicates_are_dropped_whether_delivered_or_held() -> None:
    live = live_request()
    for index in (1, 1, 2, 1, 2):
        live.take(token(live.key, index), "d0")
    for _ in range(3):
        live.take(token(live.key, 0), "p0")
    live.take(token(live.key, 2), "d0")
    await events(live)
    assert live.tokens == [0, 1, 2]


@in_virtual_time
async def test_other_epochs_and_requests_are_dropped_even_if_they_are_errors() -> None:
    live = live_request()
    live.place(PAIR)
    for key in (Key("r", 0), Key("r", 2), Key("s", 1)):
        assert not live.take(token(key, 0), "p0")
        live.take(TokenOutput(key, 0, (), FinishReason.ERROR, ErrorInfo("overloaded", "full")), "d0")
        live.take(TokenOutput(key, 0, (), FinishReason.ABORT), "p0")
    assert await events(live) == []


@in_virtual_time
async def test_a_new_placement_goes_on_after_the_tokens_that_the_client_has() -> None:
    live = live_request()
    live.take(token(live.key, 0), "p0")
    await events(live)
    live.take(token(live.key, 1), "d0")  # queued, and not yet with the client
    live.take(token(live.key, 3), "d0")  # held back
    live.place(PAIR)
    assert live.key == Key("r", 1)
    assert not live.handed_off
    assert live.placed_request(now=40.0).generated_ids == (0,)
    assert live.placed_request(now=40.0).timeout_s == 60.0
    live.take(token(live.key, 1), "p0")
    live.take(token(live.key, 2), "d0")
    await events(live)
    assert live.tokens == [0, 1, 2]


@in_virtual_time
async def test_what_an_older_placement_held_back_is_not_in_the_way_of_the_new_one() -> None:
    live = live_request()
    live.take(token(live.key, 4), "d0")
    live.place(PAIR)
    live.take(token(live.key, 1), "d0")
    live.take(token(live.key, 0), "p0")
    await events(live)
    assert live.tokens == [0, 1]


@in_virtual_time
async def test_errors_and_aborts_from_a_worker_fail_the_placement() -> None:
    live = live_request()
    live.take(TokenOutput(live.key, 0, (), FinishReason.ERROR, ErrorInfo("overloaded", "full")), "d0")
    live.take(TokenOutput(live.key, 0, (), FinishReason.ABORT), "p0")
    assert [type(event) for event in await events(live)] == [Overloaded, WorkerLost]


@in_virtual_time
async def test_usage_reports_the_cached_tokens_of_the_first_placement() -> None:
    live = live_request()
    live.take(token(live.key, 0, cached=3), "p0")
    live.take(token(live.key, 1, cached=9), "d0")
    found = await events(live)
    assert {event.cached_tokens for event in found if isinstance(event, TokenOutput)} == {3}


def test_a_request_past_its_deadline_has_no_negative_time_left() -> None:
    assert live_request().placed_request(now=1000.0).timeout_s == 0.0


@in_virtual_time
async def test_it_depends_on_both_workers_until_decode_has_taken_over() -> None:
    live = live_request()
    assert ("p0", "i1") in live.workers and ("d0", "i1") in live.workers
    assert ("p0", "i2") not in live.workers and ("d0", "i2") not in live.workers
    live.take(token(live.key, 0), "p0")
    assert ("p0", "i1") in live.workers
    live.take(token(live.key, 1), "d0")
    assert ("p0", "i1") not in live.workers
    assert ("d0", "i1") in live.workers


@in_virtual_time
async def test_one_worker_alone_is_depended_on_to_the_end() -> None:
    live = live_request(ALONE)
    assert live.is_prefilling
    for index in range(3):
        live.take(token(live.key, index), "p0")
    assert ("p0", "i1") in live.workers and live.first_worker == ("p0", "i1")
    assert not live.is_prefilling


def test_a_request_without_a_placement_depends_on_nobody() -> None:
    live = LiveRequest(request(), deadline=1.0)
    assert ("p0", "i1") not in live.workers and live.first_worker != ("p0", "i1")


@settings(max_examples=80, deadline=None)
@given(st.data())
@in_virtual_time
async def test_no_token_is_lost_doubled_or_reordered(data: st.DataObject) -> None:
    """The history is made as it goes, because a new placement begins where the client is."""
    live = live_request()
    total = data.draw(st.integers(1, 12), "total")
    old: list[tuple[TokenOutput, str]] = []
    for left in reversed(range(data.draw(st.integers(1, 3), "placements"))):
        start = len(live.tokens)
        if start == total:
            break
        cuts = data.draw(st.lists(st.integers(start + 1, total), unique=True).map(sorted), "cuts")
        edges = sorted({start + 1, *cuts, total})
        runs = [(a, b) for a, b in itertools.pairwise(edges)]
        streams = [
            [(token(live.key, start), "p0")],
            [(token(live.key, a, *range(a, b)), "d0") for a, b in runs],
        ]
        while any(streams):
            if left and data.draw(st.integers(0, 5), "fails") == 0:
                break
            came = data.draw(st.sampled_from([stream for stream in streams if stream]), "stream").pop(0)
            old.append(came)
            for output, worker_id in [came, *data.draw(st.lists(st.sampled_from(old), max_size=2), "again")]:
                live.take(output, worker_id)
            if data.draw(st.booleans(), "read"):
                await events(live)
            assert live.tokens == list(range(len(live.tokens)))
        else:
            await events(live)
            assert live.tokens == list(range(total))
            return
        live.fail(WorkerLost("gone"))
        live.place(PAIR)
    assert live.tokens == list(range(len(live.tokens)))


@pytest.mark.parametrize("placement", [PAIR, ALONE])
@in_virtual_time
async def test_a_failure_comes_after_the_tokens_that_were_there_before_it(placement: Placement) -> None:
    live = live_request(placement)
    live.take(token(live.key, 0), "p0")
    live.fail(WorkerLost("gone"))
    first, second = await events(live)
    assert isinstance(first, TokenOutput) and isinstance(second, WorkerLost)
