"""The predictor: sane before it knows anything, right once it does, judged by what it said before it learnt."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.step_shape import Chunk, StepRecord, StepShape, decode_shape
from engine.types import KvPath, KvTransfer, Role, TransferReport
from router.membership import Member, Pool
from router.predict import NUM_COLD, Predictor

PREFILL, DECODE = Pool("c", Role.PREFILL), Pool("c", Role.DECODE)
CHUNK = 256
MB = 2**20


def member(role: Role = Role.PREFILL, worker_id: str = "w0") -> Member:
    return Member(worker_id, "1", role, 0, "a:1", "c")


def step_s(shape: StepShape) -> float:
    """What a machine takes."""
    num_pairs = sum(chunk.num_new * (chunk.num_new + 2 * chunk.num_before) for chunk in shape.chunks)
    load = 8e-4 * shape.num_decoding + 2e-6 * shape.num_context
    return 0.02 + 1e-3 * shape.num_chunk_tokens + 2e-7 * num_pairs + load


def records(seed: int, count: int, factor: float = 1.0) -> Iterator[StepRecord]:
    chance = random.Random(seed)
    for _ in range(count):
        chunks = [Chunk(chance.choice((0, 256, 512)), chance.randint(1, CHUNK)) for _ in range(chance.randint(0, 2))]
        decodes = decode_shape([chance.randint(1, 2000) for _ in range(chance.randint(0 if chunks else 1, 16))])
        shape = StepShape(tuple(chunks), decodes.num_decoding, decodes.num_context)
        yield StepRecord(shape, factor * step_s(shape))


def learnt(predictor: Predictor, of: Member, factor: float = 1.0) -> Predictor:
    predictor.learn(of, records(1, 300, factor))
    return predictor


def test_before_it_knows_anything_it_says_something_sane() -> None:
    predictor = Predictor()
    assert 0.001 < predictor.decode_step_s(DECODE, 1, 100) < 1
    assert 0.01 < predictor.prefill_s(PREFILL, 1000, 0, CHUNK) < 60
    assert 0.0001 < predictor.transfer_s("p0", "d0", 10 * MB) < 10
    assert predictor.step_s(PREFILL, StepShape()) == predictor.prefill_s(PREFILL, 0, 100, CHUNK) == 0
    assert predictor.view() == ()


def test_it_learns_steps_of_both_kinds_and_says_how_far_off_it_was() -> None:
    predictor = learnt(Predictor(), member())
    for record in records(2, 100):
        assert predictor.step_s(PREFILL, record.shape) == pytest.approx(record.step_s, rel=0.1)
    assert {one.kind for one in predictor.view()} == {"prefill", "decode"}
    assert all(one.median < 0.15 and one.median <= one.p90 for one in predictor.view())


@given(st.integers(1, 5000), st.integers(0, 5000), st.integers(1, 600))
def test_a_prompt_takes_as_long_as_the_steps_of_its_chunks(num_new: int, num_cached: int, chunk: int) -> None:
    predictor = LEARNT
    starts = [*range(num_cached, num_cached + num_new, chunk), num_cached + num_new]
    steps = [StepShape((Chunk(start, stop - start),)) for start, stop in pairwise(starts)]
    expected = sum(predictor.step_s(PREFILL, shape) for shape in steps)
    assert predictor.prefill_s(PREFILL, num_new, num_cached, chunk) == pytest.approx(expected)


LEARNT = learnt(Predictor(), member())


def test_pools_do_not_learn_from_each_other() -> None:
    predictor = learnt(Predictor(), member())
    learnt(predictor, member(Role.DECODE), factor=4)
    slow, fast = (predictor.decode_step_s(pool, 8, 4000) for pool in (DECODE, PREFILL))
    assert slow == pytest.approx(4 * fast, rel=0.1)


def test_the_first_steps_of_a_life_do_not_count() -> None:
    predictor = Predictor()
    before = predictor.decode_step_s(DECODE, 1, 100)
    predictor.learn(member(Role.DECODE), [StepRecord(decode_shape([100]), 30.0)] * NUM_COLD)
    assert predictor.decode_step_s(DECODE, 1, 100) == before and predictor.view() == ()
    predictor.learn(member(Role.DECODE), [StepRecord(decode_shape([100]), 0.5)])
    assert predictor.decode_step_s(DECODE, 1, 100) == pytest.approx(0.5)


def test_a_pool_is_calibrated_once_by_whoever_starts_first() -> None:
    predictor = Predictor()
    predictor.calibrate(PREFILL, records(3, 12))
    before = predictor.prefill_s(PREFILL, 200, 0, CHUNK)
    assert before == pytest.approx(step_s(StepShape((Chunk(0, 200),))), rel=0.3)
    predictor.calibrate(PREFILL, records(3, 12, factor=9))
    assert predictor.prefill_s(PREFILL, 200, 0, CHUNK) == before
    assert predictor.view() == (), "nothing was foretold"


# --- transfers ------------------------------------------------------------------------------------------------


def transfer(num_left: int, exposed_s: float) -> KvTransfer:
    return KvTransfer("shm", num_left + 7 * MB, 7 * MB, 1.0, exposed_s)


def test_a_transfer_takes_what_is_left_to_move_over_what_the_link_was_seen_to_do() -> None:
    predictor, chance = Predictor(), random.Random(5)
    for _ in range(60):
        size = chance.randint(1, 200) * MB
        predictor.learn_transfer("p0", "d0", transfer(size, 0.003 + size / 2e8))
    for size in (MB, 50 * MB, 400 * MB):
        assert predictor.transfer_s("p0", "d0", size) == pytest.approx(0.003 + size / 2e8, rel=0.1)
        assert predictor.transfer_s("p1", "d0", size) == predictor.transfer_s("p0", "d0", size), "of others, by all"
    (error,) = predictor.view()
    assert (error.kind, error.num_judged) == ("transfer", 60) and error.median < 0.1


def test_before_any_transfer_the_measured_path_counts() -> None:
    predictor = Predictor()
    guess = predictor.transfer_s("p0", "d0", 1000 * MB)
    paths = (KvPath("p0", "grpc", 1e7), KvPath("p0", "shm", 1e10))
    predictor.hear_paths("d0", TransferReport(paths=paths))
    assert predictor.transfer_s("p0", "d0", 1000 * MB) < guess / 5, "by the fastest carrier"
    assert predictor.transfer_s("p0", "d1", 1000 * MB) == guess
    predictor.forget("p0", "1")
    assert predictor.transfer_s("p0", "d0", 1000 * MB) == guess


# --- errors ---------------------------------------------------------------------------------------------------


def test_errors_are_relative_and_the_last_ones_count() -> None:
    predictor = Predictor()
    for number in range(1, 101):
        predictor.judge_ttft(1 + number / 100, 1.0)
    (error,) = predictor.view()
    assert (error.kind, error.num_judged) == ("ttft", 100)
    assert (error.median, error.p90) == (pytest.approx(0.5, abs=0.02), pytest.approx(0.9, abs=0.02))
    for _ in range(2000):
        predictor.judge_ttft(1.0, 1.0)
    assert [(one.median, one.p90) for one in predictor.view()] == [(0, 0)]
    predictor.judge_ttft(1.0, math.nan)
    predictor.judge_ttft(1.0, math.inf)
    assert [(one.median, one.p90) for one in predictor.view()] == [(0, 0)], "what is no time is not judged"
