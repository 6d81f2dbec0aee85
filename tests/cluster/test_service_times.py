"""Service times: tables say what was measured, closed forms what was published, and mixed steps lie between."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.simulator.service_times.decode_table import DecodeTable, grid
from cluster.simulator.service_times.distserve import DistServeDecode, DistServePrefill
from cluster.simulator.service_times.dynamo import DynamoTimes
from cluster.simulator.service_times.fit import fit_roofline
from cluster.simulator.service_times.measured import MeasuredTimes
from cluster.simulator.service_times.model import ServiceTimes
from cluster.simulator.service_times.nonnegative import nonnegative_fit
from cluster.simulator.service_times.phases import PhaseTimes
from cluster.simulator.service_times.prefill_table import PrefillTable
from cluster.simulator.service_times.roofline import Roofline
from engine.step_shape import Chunk, StepRecord, StepShape

LENGTHS = (128, 512, 1024, 2048, 4096, 8192)
FIXED_S, TOKEN_S, SQUARE_S = 4e-3, 2e-5, 1e-9
SECONDS = [FIXED_S + TOKEN_S * n + SQUARE_S * n * n for n in LENGTHS]
BATCHES, CONTEXTS = (1, 8, 64), (512, 2048, 8192)


def decode_point(batch: float, context: float) -> float:
    return 5e-3 + 1e-5 * batch + 3e-8 * batch * context


PREFILL = PrefillTable(LENGTHS, SECONDS)
DECODE = DecodeTable(
    grid(BATCHES, CONTEXTS, [[decode_point(b, c) for c in CONTEXTS] for b in BATCHES]), rows_are_batches=True
)
TABLE = PhaseTimes(PREFILL, DECODE)
BY_TOKENS = PhaseTimes(
    PREFILL,
    DecodeTable(
        [(350.0, 1e3, 5e-3), (350.0, 4e5, 4e-2), (4000.0, 8e3, 5.2e-3), (4000.0, 2e5, 1.1e-2), (4000.0, 9e5, 3e-2)],
        rows_are_batches=False,
    ),
)
CLOSED = PhaseTimes(
    DistServePrefill((0.018, 1e-4, 7e-9)), DistServeDecode((0.020, 6e-7, 4e-5), (0.007, 6e-7, 1.6e-4), 95)
)
DYNAMO = DynamoTimes(
    [100.0, 200.0, 1000.0],
    [1e-3, 3e-3, 2e-2],
    [0.0, 1e4, 1e5],
    [1.0, 1000.0],
    [[6e-3, 6e-3], [7e-3, 8e-3], [3e-2, 2e-2]],
)
MEASURED = MeasuredTimes(
    [
        StepRecord(StepShape((), batch, batch * context), decode_point(batch, context) * (1.1 if batch == 8 else 1.0))
        for batch in BATCHES
        for context in CONTEXTS
    ]
    + [StepRecord(StepShape((Chunk(0, n),)), s) for n, s in zip(LENGTHS, SECONDS, strict=True)]
)
MODELS: dict[str, ServiceTimes] = {
    "roofline": Roofline(pair_s=1e-10), "table": TABLE, "table by tokens": BY_TOKENS, "closed forms": CLOSED,
    "dynamo": DYNAMO, "measured": MEASURED,
}  # fmt: skip


def whole(*lengths: int) -> StepShape:
    return StepShape(tuple(Chunk(0, length) for length in lengths))


def decode(batch: int, context: int) -> StepShape:
    return StepShape((), batch, batch * context)


# --- every model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@given(st.integers(1, 300), st.integers(1, 20_000), st.integers(1, 40))
def test_steps_told_together_are_those_told_one_by_one_bit_for_bit(
    name: str, num_decoding: int, mean: int, num_steps: int
) -> None:
    times, first = MODELS[name], num_decoding * mean + num_decoding // 3
    one_by_one = [times.step_s(StepShape((), num_decoding, first + num_decoding * step)) for step in range(num_steps)]
    assert times.decode_steps_s(num_decoding, first, num_steps) == one_by_one


shapes = st.builds(
    StepShape,
    st.lists(st.builds(Chunk, st.integers(0, 30_000), st.integers(1, 9000)), min_size=1, max_size=4).map(tuple),
    st.just(0),
    st.just(0),
)


@pytest.mark.parametrize("name", ["roofline", "table", "closed forms"])
@given(shapes, st.integers(0, 200), st.integers(1, 9000), st.data())
def test_more_work_never_takes_less_time(
    name: str, chunks: StepShape, num_decoding: int, mean: int, data: st.DataObject
) -> None:
    times, eps = MODELS[name], 1 + 1e-9
    shape = StepShape(chunks.chunks, num_decoding, num_decoding * mean)
    step_s = times.step_s(shape)
    index = data.draw(st.integers(0, len(shape.chunks) - 1))
    before, new = data.draw(st.sampled_from([(1, 0), (0, 1), (500, 0), (0, 500)]))
    grown = [*shape.chunks]
    grown[index] = Chunk(grown[index].num_before + before, grown[index].num_new + new)
    assert times.step_s(StepShape(tuple(grown), num_decoding, shape.num_context)) * eps >= step_s
    assert times.step_s(StepShape(shape.chunks, num_decoding, shape.num_context + num_decoding * 50)) * eps >= step_s
    assert step_s * eps >= times.step_s(chunks)
    if num_decoding:
        assert step_s * eps >= times.step_s(StepShape((), num_decoding, shape.num_context))


# --- tables -----------------------------------------------------------------------------------------------------


def test_steps_of_one_kind_are_the_table_exactly() -> None:
    for length, seconds in zip(LENGTHS, SECONDS, strict=True):
        assert TABLE.step_s(whole(length)) == seconds
    for batch in BATCHES:
        for context in CONTEXTS:
            assert TABLE.step_s(decode(batch, context)) == decode_point(batch, context)


@given(st.floats(128, 8192), st.floats(1, 64), st.floats(512, 8192))
def test_between_its_points_a_table_is_linear(length: float, batch: float, context: float) -> None:
    assert PREFILL._alone_s(length) == pytest.approx(np.interp(length, LENGTHS, SECONDS))  # pyright: ignore
    in_batch = [np.interp(context, CONTEXTS, [decode_point(b, c) for c in CONTEXTS]) for b in BATCHES]
    assert DECODE._rows.at(batch, context) == pytest.approx(np.interp(batch, BATCHES, in_batch))
    assert not TABLE.extrapolates(StepShape((Chunk(0, int(length)),), int(batch), int(batch) * int(context)))


def test_rows_may_have_points_of_their_own() -> None:
    def at(mean: int, tokens: int) -> float:
        return BY_TOKENS.decode.decode_s(tokens // mean, tokens)

    assert at(350, 350_000) == pytest.approx(5e-3 + (350_000 - 1e3) / (4e5 - 1e3) * 35e-3)
    assert at(4000, 200_000) == 1.1e-2
    halfway = StepShape((), 80, 80 * 2175)
    low = 5e-3 + (174_000 - 1e3) / (4e5 - 1e3) * 35e-3
    high = 5.2e-3 + (174_000 - 8e3) / (2e5 - 8e3) * 5.8e-3
    assert BY_TOKENS.step_s(halfway) == pytest.approx((low + high) / 2)
    assert not BY_TOKENS.extrapolates(halfway)
    assert not BY_TOKENS.extrapolates(StepShape((), 298, 298 * 2175)), "the rows' ends are 400,000 and 900,000"
    assert BY_TOKENS.extrapolates(StepShape((), 300, 300 * 2175))
    assert BY_TOKENS.extrapolates(StepShape((), 1, 4001))


@pytest.mark.parametrize(
    ("shape", "is_beyond"),
    [
        (whole(128), False), (whole(8192), False), (whole(8193), True), (whole(127), True), (whole(4096, 4096), False),
        (whole(4096, 4097), True), (StepShape((Chunk(8000, 193),)), True), (decode(64, 8192), False),
        (decode(65, 8192), True), (decode(64, 8193), True), (decode(8, 511), True), (decode(2, 512), False),
        (StepShape((Chunk(0, 500),), 64, 64 * 9000), True), (StepShape((Chunk(0, 9000),), 64, 64 * 900), True),
    ],
    ids=str,
)  # fmt: skip
def test_what_was_not_measured_is_said(shape: StepShape, is_beyond: bool) -> None:
    assert TABLE.extrapolates(shape) is is_beyond


def test_beyond_the_table_a_quadratic_goes_on_without_a_jump() -> None:
    for length in (8193, 20_000, 100_000):
        assert TABLE.step_s(whole(length)) == pytest.approx(FIXED_S + TOKEN_S * length + SQUARE_S * length**2)
    for batch, context in ((65, 4000), (500, 500), (3, 60_000), (900, 20_000)):
        assert TABLE.step_s(decode(batch, context)) == pytest.approx(decode_point(batch, context), rel=1e-3)
    assert TABLE.step_s(decode(64, 8193)) == pytest.approx(TABLE.step_s(decode(64, 8192)), rel=1e-3)


def test_noise_beyond_the_table_does_not_make_longer_prompts_faster() -> None:
    """As in a published sweep, one of whose points is far above its neighbours."""
    noisy = PrefillTable((100, 2000, 4000, 6000, 8000), (0.019, 0.095, 0.162, 0.498, 0.321))
    times = PhaseTimes(noisy, DECODE)
    steps = [times.step_s(whole(length)) for length in range(8000, 50_000, 1000)]
    assert steps == sorted(steps)


# --- chunks -----------------------------------------------------------------------------------------------------


@given(st.integers(1, 4000), st.integers(128, 4000))
def test_a_chunk_costs_the_rest_of_the_curve_and_what_every_step_costs(num_before: int, num_new: int) -> None:
    """On a curve that is its own fit: seen to the quadratic's accuracy, as the table is linear between points."""
    times = PhaseTimes(PrefillTable([*range(1, 8100, 10)], [_curve(n) for n in range(1, 8100, 10)]), DECODE)
    expected = FIXED_S + _curve(num_before + num_new) - _curve(num_before)
    assert times.step_s(StepShape((Chunk(num_before, num_new),))) == pytest.approx(max(expected, 5e-3), rel=1e-3)


def _curve(length: int) -> float:
    return FIXED_S + TOKEN_S * length + SQUARE_S * length * length


def test_prompts_of_one_step_pay_the_weights_once_and_attention_each_for_itself() -> None:
    assert TABLE.step_s(whole(1024, 1024)) == pytest.approx(FIXED_S + TOKEN_S * 2048 + 2 * SQUARE_S * 1024**2, rel=1e-6)
    assert TABLE.step_s(whole(1024, 1024)) < 2 * TABLE.step_s(whole(1024))


def test_one_token_after_a_long_cached_prompt_reads_the_weights_and_what_is_stored() -> None:
    step_s = TABLE.step_s(StepShape((Chunk(100_000, 1),)))
    assert step_s >= 5e-3 + 100_000 * 3e-8 * 0.99


# --- mixed steps ------------------------------------------------------------------------------------------------


def test_a_mixed_step_is_overhead_and_the_longer_of_memory_and_compute() -> None:
    overhead_s, batch, context = FIXED_S, 64, 8192
    memory_s = decode_point(batch, context) - overhead_s
    for chunk, seconds in zip(LENGTHS, SECONDS, strict=True):
        compute_s = seconds - overhead_s + TOKEN_S * batch
        mixed_s = TABLE.step_s(StepShape((Chunk(0, chunk),), batch, batch * context))
        assert mixed_s == pytest.approx(overhead_s + max(memory_s, compute_s))
        assert mixed_s < seconds + decode_point(batch, context), "the weights are read once"
    assert TABLE.step_s(StepShape((Chunk(0, 128),), batch, batch * context)) == decode_point(batch, context)


def test_a_mixed_step_with_next_to_nothing_beside_it_is_a_pure_one() -> None:
    assert CLOSED.step_s(StepShape((Chunk(0, 1),), 8, 8000)) == pytest.approx(CLOSED.step_s(decode(8, 1000)))
    assert CLOSED.step_s(StepShape((Chunk(0, 4000),), 1, 1)) == pytest.approx(CLOSED.step_s(whole(4000)), rel=1e-2)


# --- closed forms and Dynamo's rules ----------------------------------------------------------------------------


def test_distserve_is_its_closed_forms() -> None:
    assert CLOSED.step_s(whole(100, 300)) == pytest.approx(0.018 + 1e-4 * 400 + 7e-9 * (100**2 + 300**2))
    assert CLOSED.step_s(StepShape((Chunk(200, 100),))) == pytest.approx(
        max(0.018 + 1e-4 * 100 + 7e-9 * (300**2 - 200**2), 0.020 + 6e-7 * 200)
    )
    assert CLOSED.step_s(StepShape((), 94, 50_000)) == pytest.approx(0.020 + 6e-7 * 50_000 + 4e-5 * 94)
    assert CLOSED.step_s(StepShape((), 95, 50_000)) == pytest.approx(0.007 + 6e-7 * 50_000 + 1.6e-4 * 95)
    assert not CLOSED.extrapolates(whole(10**6))


@pytest.mark.parametrize(
    ("shape", "seconds"),
    [
        (whole(150), 2e-3), (whole(100, 100), 3e-3), (whole(100, 101), 3e-3), (StepShape((Chunk(7000, 200),)), 3e-3),
        (StepShape((Chunk(5, 100), Chunk(0, 100))), 3e-3), (whole(1100), 2e-2 + 1.7e-2 / 8), (whole(40), 0.0),
        (StepShape((), 10, 10_000), 8e-3), (StepShape((), 10, 10_009), 8e-3 + 9 / 9e4 * 1.2e-2),
        (StepShape((), 5, 10_000), 7e-3 + 1e-3 * 1999 / 999),
        (StepShape((), 50, 250_000), 1e-3), (StepShape((Chunk(0, 150),), 10, 10_000), 1e-2),
    ],
    ids=str,
)  # fmt: skip
def test_dynamo_times_are_those_of_its_mocker(shape: StepShape, seconds: float) -> None:
    """Means rounded down, straight lines beyond the table, cached tokens for nothing, at least 0 and 1 ms, the sum."""
    assert DYNAMO.step_s(shape) == pytest.approx(seconds)


def test_dynamo_times_say_what_is_beyond() -> None:
    inside = [whole(100), whole(1000), StepShape((), 10, 10_000), StepShape((Chunk(0, 500),), 100, 100_000)]
    outside = [whole(99), whole(600, 600), StepShape((), 10, 10_010), StepShape((Chunk(0, 500),), 101, 101_000)]
    assert not any(map(DYNAMO.extrapolates, inside))
    assert all(map(DYNAMO.extrapolates, outside))


# --- fits -------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 10), min_size=3, max_size=3))
def test_a_fit_finds_coefficients_that_are_not_negative(coefficients: Sequence[float]) -> None:
    at = np.linspace(1, 9, 20)
    columns = np.stack([np.ones_like(at), at, at**2], axis=1)
    found = nonnegative_fit(columns, columns @ np.array(coefficients), np.ones_like(at))
    assert columns @ found == pytest.approx(columns @ np.array(coefficients), abs=1e-6)


def test_a_fit_leaves_out_what_would_be_negative() -> None:
    at = np.linspace(1, 9, 20)
    columns = np.stack([np.ones_like(at), at], axis=1)
    assert nonnegative_fit(columns, 10 - at, np.ones_like(at)) == pytest.approx([5.0, 0.0])


def test_a_roofline_is_found_again() -> None:
    known = Roofline(2e-3, 4e-3, 5e-8, 4e-5, 6e-5, 1e-10)
    shapes = [decode(batch, context) for batch in (1, 16, 64, 256) for context in (100, 1000, 8000)]
    shapes += [StepShape((Chunk(before, new),)) for before in (0, 4000) for new in (16, 128, 512, 2048)]
    shapes += [StepShape((Chunk(0, new),), 64, 64_000) for new in (64, 512, 2048)]
    fitted = fit_roofline([StepRecord(shape, known.step_s(shape)) for shape in shapes])
    assert fitted.p90_error < 1e-6
    assert fitted.num_shapes == len(shapes)
    assert fitted.times.weights_s == pytest.approx(4e-3, rel=1e-3)
    assert fitted.times.pair_s == pytest.approx(1e-10, rel=1e-3)
