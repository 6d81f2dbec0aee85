from __future__ import annotations

import pytest

from engine.errors import Overloaded
from engine.step_shape import Chunk, StepRecord, StepShape
from engine.types import EngineStats
from prefill_worker.forecast import Forecast
from prefill_worker.knee import Knee


def record(num_tokens: int, step_s: float, num_decoding: int = 0) -> StepRecord:
    return StepRecord(StepShape((Chunk(0, num_tokens),), num_decoding, 100 * num_decoding), step_s)


def test_the_knee_is_where_more_tokens_make_none_cheaper() -> None:
    knee = Knee()
    assert knee.tokens(512) == 512, "nothing is known"
    for num_tokens in (20, 50, 100, 200, 400):
        knee.learn([record(num_tokens, max(0.010, num_tokens * 1e-4)), record(num_tokens, 1.0, num_decoding=4)])
    assert knee.tokens(512) == 128
    assert knee.tokens(64) == 64


def test_as_long_as_larger_steps_were_always_cheaper_there_is_no_knee() -> None:
    knee = Knee()
    knee.learn([record(10, 0.010), record(40, 0.010)])
    assert knee.tokens(512) == 512


def test_what_is_likely_to_be_cached_takes_no_time() -> None:
    forecast = Forecast(256, 512)
    assert forecast.compute_s(1000, EngineStats()) == 0.0
    forecast.learn([record(100, 0.010)])
    assert forecast.compute_s(1000, EngineStats()) == pytest.approx(0.1)
    assert forecast.compute_s(1000, EngineStats(prefix_queries=400, prefix_hits=300)) == pytest.approx(0.025)


def test_steps_are_no_larger_than_the_slack_of_those_that_decode() -> None:
    forecast = Forecast(256, 512, knee_tokens=128)
    assert [forecast.step_tokens(EngineStats(slack_tokens=slack)) for slack in (0, 40, 1000)] == [1, 40, 128]


@pytest.mark.parametrize(
    ("ttft_s", "before_s", "compute_s", "is_refused"),
    [
        (1.0, 0.5, 0.5, False),
        (1.0, 0.6, 0.5, False),  # predictions err
        (1.0, 1.0, 0.5, True),
        (1.0, 1.0, 1.5, False),  # late in any case
        (float("inf"), 1e6, 1.0, False),
        (float("nan"), 1.0, 0.5, False),
    ],
)
def test_only_what_is_late_for_others_is_refused(
    ttft_s: float, before_s: float, compute_s: float, is_refused: bool
) -> None:
    forecast = Forecast(256, 512)
    Forecast(256, 512, refuse_late=False).check(ttft_s, before_s, compute_s)
    if not is_refused:
        forecast.check(ttft_s, before_s, compute_s)
        return
    with pytest.raises(Overloaded) as caught:
        forecast.check(ttft_s, before_s, compute_s)
    assert caught.value.retry_after_s == pytest.approx(before_s + compute_s - ttft_s)
