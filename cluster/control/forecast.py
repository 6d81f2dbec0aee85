"""Forecasts of one quantity, a horizon ahead: of several models the one is believed that was least wrong of late. Pure.

1. every bucket of time brings a value; each model's forecast for it, made a horizon before, is judged;
2. `ahead` is the forecast of the model with the least error. While none has been judged, it is the last value's.
A model is a function from the values so far to one some buckets ahead. They are cheap: planning must never wait for
one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

Model = Callable[[Sequence[float], int], float]

MOST_VALUES = 120
ERROR_RATE = 0.15  # of the mean error, by each that is judged
SMOOTHING = 0.3
TREND, DAMPING = 0.3, 0.9
LAGS = 4  # of the autoregression
FEWEST_FOR_LAGS = 24
RIDGE = 1e-3  # of the variance: weights stay small where there is only noise


def last(values: Sequence[float], _ahead: int) -> float:
    return values[-1]


def smoothed(values: Sequence[float], _ahead: int) -> float:
    """Exponentially: for what is noise around a level."""
    level = values[0]
    for value in values[1:]:
        level += SMOOTHING * (value - level)
    return level


def trend(values: Sequence[float], ahead: int) -> float:
    """Holt's, damped: what rises goes on rising for a while (Gardner and McKenzie, 1985)."""
    level, slope = values[0], 0.0
    for value in values[1:]:
        before = level
        level = SMOOTHING * value + (1 - SMOOTHING) * (level + DAMPING * slope)
        slope = TREND * (level - before) + (1 - TREND) * DAMPING * slope
    return level + slope * sum(DAMPING**step for step in range(1, ahead + 1))


def autoregression(values: Sequence[float], ahead: int) -> float:
    """Of the last few, by least squares: for what swings."""
    if len(values) < FEWEST_FOR_LAGS:
        return values[-1]
    mean = sum(values) / len(values)
    series = np.asarray(values, dtype=float) - mean
    rows = np.stack([series[lag : len(series) - LAGS + lag] for lag in range(LAGS)], 1)
    ridge = (RIDGE * float(np.mean(series**2)) * len(rows) + 1e-12) * np.eye(LAGS)
    weights = np.linalg.solve(rows.T @ rows + ridge, rows.T @ series[LAGS:])
    recent = list(series[-LAGS:])
    for _ in range(ahead):
        recent = [*recent[1:], float(np.dot(weights, recent))]
    return min(max(mean + recent[-1], 0.0), 2 * max(values))


MODELS: dict[str, Model] = {"last": last, "smoothed": smoothed, "trend": trend, "autoregression": autoregression}


@dataclass(frozen=True, slots=True)
class Forecast:
    """`made`: for each bucket to come, the nearest first, what each model said of it; `errors`: relative, of late."""

    horizon: int = 1  # buckets
    values: tuple[float, ...] = ()
    made: tuple[tuple[float, ...], ...] = ()
    errors: tuple[float, ...] = field(default=())

    @property
    def model(self) -> str:
        """The one that is believed."""
        if not self.errors:
            return next(iter(MODELS))
        return min(zip(self.errors, MODELS, strict=True), key=lambda one: one[0])[1]

    @property
    def error(self) -> float:
        """Of that one; 0 while none has been judged."""
        return min(self.errors, default=0.0)

    def ahead(self) -> float | None:
        """A horizon from now; None: nothing is known."""
        if not self.values:
            return None
        return _sane(MODELS[self.model], self.values, self.horizon)

    def then(self, value: float) -> Forecast:
        """With the value of one more bucket."""
        if not math.isfinite(value) or value < 0:
            return self
        values = (*self.values, value)[-MOST_VALUES:]
        errors = self.errors
        made = self.made
        if len(made) == self.horizon:
            scale = max(abs(value), 0.05 * max(values), 1e-9)
            wrong = [abs(one - value) / scale for one in made[0]]
            errors = tuple(
                old + ERROR_RATE * (min(new, 10.0) - old) for old, new in zip(errors or wrong, wrong, strict=True)
            )
            made = made[1:]
        now = tuple(_sane(model, values, self.horizon) for model in MODELS.values())
        return replace(self, values=values, made=(*made, now), errors=errors)


def _sane(model: Model, values: Sequence[float], ahead: int) -> float:
    """What it says, if that can be; else that all stays as it is. A quantity is never below 0."""
    value = model(values, ahead)
    return max(0.0, value) if math.isfinite(value) else values[-1]
