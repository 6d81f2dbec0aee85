from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.pace import MIN_LEARNT, Pace
from engine.slack import Paced, broken_promise
from engine.step_shape import Chunk, StepRecord, StepShape

DECODE_S, CHUNK_S = (5e-3, 1e-4, 2e-6), (5e-5, 1e-8)  # overhead, sequence, position; token, pair


def step_s(shape: StepShape, slowdown: float = 1.0) -> float:
    num_pairs = sum(chunk.num_new * (chunk.num_before + chunk.num_new / 2) for chunk in shape.chunks)
    decode_s = DECODE_S[0] + DECODE_S[1] * shape.num_decoding + DECODE_S[2] * shape.num_context
    return slowdown * (decode_s + CHUNK_S[0] * shape.num_chunk_tokens + CHUNK_S[1] * num_pairs)


def shapes(num: int) -> list[StepShape]:
    """Steps of many kinds, most of which only decode."""
    found = []
    for index in range(num):
        chunks = (Chunk(97 * index % 2000, 1 + 37 * index % 256),) if index % 3 == 0 else ()
        found.append(StepShape(chunks, 1 + index % 11, 100 + 53 * index % 5000))
    return found


def learnt(num: int = 200, slowdown: float = 1.0, pace: Pace | None = None) -> Pace:
    pace = Pace() if pace is None else pace
    pace.learn_all(StepRecord(shape, step_s(shape, slowdown)) for shape in shapes(num))
    return pace


PACE = learnt()


@given(st.integers(1, 20), st.integers(0, 9000), st.integers(0, 3000), st.integers(0, 300))
def test_it_predicts_the_steps_of_a_linear_machine(num: int, context: int, before: int, new: int) -> None:
    shape = StepShape((Chunk(before, new),) if new else (), num, context)
    assert PACE.step_s(shape) == pytest.approx(step_s(shape), rel=0.02)


def test_nothing_is_predicted_before_enough_was_measured() -> None:
    pace = Pace()
    decode, mixed = StepShape((), 2, 100), StepShape((Chunk(0, 64),), 2, 100)
    assert (pace.step_s(decode), pace.step_s(mixed), pace.prefill_s(10, 0, 256)) == (None, None, None)
    for _ in range(MIN_LEARNT):
        pace.learn(StepRecord(decode, 0.01))
        pace.learn(StepRecord(mixed, 0.02))
    assert pace.step_s(decode) == pytest.approx(0.01, rel=0.01)
    assert pace.step_s(StepShape((Chunk(0, 1000),), 2, 100)) is None, "far larger than any"


@given(st.floats(1e-4, 0.1), st.integers(1, 20), st.integers(0, 9000), st.integers(0, 3000), st.integers(1, 400))
def test_the_chunk_that_fits_is_the_largest_that_does(
    limit_s: float, num: int, context: int, before: int, most: int
) -> None:
    found = PACE.chunk_within(limit_s, num, context, before, most)
    assert 0 <= found <= most
    if found:
        assert (PACE.step_s(StepShape((Chunk(before, found),), num, context)) or 0.0) <= limit_s * 1.0001
    if found < most:
        assert step_s(StepShape((Chunk(before, found + 2),), num, context)) > limit_s * 0.95


def test_one_step_that_was_held_up_tells_little() -> None:
    pace = learnt()
    shape = StepShape((), 4, 1000)
    pace.learn(StepRecord(shape, 100 * step_s(shape)))
    assert (pace.step_s(shape) or 0.0) < 1.5 * step_s(shape)


def test_a_machine_that_becomes_slower_is_followed() -> None:
    pace = learnt(400, slowdown=2.0, pace=learnt())
    for shape in shapes(30):
        assert pace.step_s(shape) == pytest.approx(step_s(shape, 2.0), rel=0.1)


def test_what_is_not_seen_for_long_is_not_forgotten() -> None:
    pace, same = learnt(), StepShape((), 3, 500)
    pace.learn_all(StepRecord(same, step_s(same)) for _ in range(3000))
    pace.learn(StepRecord(same, 1.01 * step_s(same)))
    other = StepShape((), 10, 4000)
    assert pace.step_s(other) == pytest.approx(step_s(other), rel=0.2)


def test_a_prompt_takes_all_its_steps() -> None:
    chunks = [StepShape((Chunk(start, 256),)) for start in (100, 356, 612, 868)]
    assert PACE.prefill_s(1024, 100, 256) == pytest.approx(sum(map(step_s, chunks)), rel=0.05)


# --- promises -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("others", "new", "is_broken"),
    [
        ([Paced(4, 2000, 0.010)], Paced(1, 500, 1.0), True),
        ([Paced(4, 2000, 0.010)], Paced(1, 500, math.inf), False),  # was promised nothing
        ([Paced(4, 2000, 0.009)], Paced(1, 500, 1.0), False),  # is not kept as it is
        ([Paced(4, 2000, math.inf)], Paced(1, 500, 0.010), True),  # its own
        ([Paced(4, 2000, math.inf)], Paced(1, 500, 0.001), False),  # which it never had
        ([], Paced(1, 500, 0.001), False),
    ],
)
def test_an_offer_is_refused_by_whom_it_would_break_a_promise(others: list[Paced], new: Paced, is_broken: bool) -> None:
    assert (broken_promise(PACE, others, new) is not None) is is_broken


def test_without_measurements_nothing_is_refused() -> None:
    assert broken_promise(Pace(), [Paced(4, 2000, 0.010)], Paced(1, 500, 1.0)) is None


def test_a_change_is_followed_though_all_steps_are_alike() -> None:
    pace, same = Pace(), StepShape((), 3, 500)
    for slowdown in (1.0, 2.0):
        pace.learn_all(StepRecord(same, step_s(same, slowdown)) for _ in range(400))
        assert pace.step_s(same) == pytest.approx(step_s(same, slowdown), rel=0.01)
