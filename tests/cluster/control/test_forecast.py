"""Forecasts: the model that was least wrong is believed."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.control.forecast import MOST_VALUES, Forecast


def after(values: Iterable[float], horizon: int = 3) -> Forecast:
    forecast = Forecast(horizon)
    for value in values:
        forecast = forecast.then(value)
    return forecast


def test_of_nothing_nothing_is_forecast() -> None:
    assert Forecast().ahead() is None
    assert after([4.0]).ahead() == 4.0


def test_a_steady_series_goes_on() -> None:
    forecast = after([7.0] * 40)
    assert forecast.ahead() == pytest.approx(7.0)
    assert forecast.error == pytest.approx(0.0)


def test_what_rises_is_forecast_higher_than_it_is() -> None:
    forecast = after([1.0 + 0.5 * step for step in range(30)])
    ahead = forecast.ahead()
    assert ahead is not None
    assert forecast.model in ("trend", "autoregression")
    assert ahead > 15.5 + 0.5


def test_what_swings_is_forecast_by_its_own_past() -> None:
    def value(step: int) -> float:
        return 10 + 5 * math.sin(2 * math.pi * step / 12)

    forecast = after(map(value, range(100)), horizon=4)
    assert forecast.model == "autoregression"
    assert forecast.ahead() == pytest.approx(value(103), abs=0.5)
    assert forecast.error < 0.1


def test_noise_is_smoothed() -> None:
    noise = [10.0 + (7 * step * step % 11 - 5) for step in range(100)]
    forecast = after(noise)
    assert forecast.model in ("smoothed", "autoregression", "trend")
    assert forecast.ahead() == pytest.approx(10.0, abs=3.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_what_is_no_number_changes_nothing(value: float) -> None:
    forecast = after([5.0, 6.0])
    assert forecast.then(value) == forecast


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=80), st.integers(1, 12))
def test_a_forecast_is_always_a_sane_number(values: list[float], horizon: int) -> None:
    forecast = after(values, horizon)
    ahead = forecast.ahead()
    assert ahead is not None
    assert math.isfinite(ahead)
    assert ahead >= 0
    assert len(forecast.made) <= horizon
    assert len(forecast.values) <= MOST_VALUES
    assert math.isfinite(forecast.error)
