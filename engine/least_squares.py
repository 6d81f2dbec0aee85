"""Least squares, recursively: a linear model that learns from one measurement at a time and forgets old ones. Pure.

Plackett's recursion with forgetting in the direction of what is measured only (Kulhavy, Restricted exponential
forgetting in real-time identification, Automatica 1987): what is not measured for long stays known.
"""

from __future__ import annotations

from collections.abc import Sequence

UNCERTAIN = 1e6  # of each coefficient before anything is known, in squares of the measure


class LeastSquares:
    """`predict` is a sum of coefficient times feature. Features should be of the order of 1."""

    def __init__(self, num_features: int, forgetting: float = 0.95) -> None:
        """`forgetting`: the weight of each measurement against the next one."""
        self.coefficients = [0.0] * num_features
        self.num_learnt = 0
        self._forgetting = forgetting
        self._covariance = [[UNCERTAIN * (row == col) for col in range(num_features)] for row in range(num_features)]

    def predict(self, features: Sequence[float]) -> float:
        return sum(weight * value for weight, value in zip(self.coefficients, features, strict=True))

    def learn(self, features: Sequence[float], measured: float, scale: float) -> None:
        """`scale`: of the measurement; errors count relative to it."""
        scaled = [value / scale for value in features]
        spread = [sum(one * value for one, value in zip(row, scaled, strict=True)) for row in self._covariance]
        variance = sum(value * one for value, one in zip(scaled, spread, strict=True))  # of the prediction
        gain = (measured - self.predict(features)) / scale / (1.0 + variance)
        self.coefficients = [old + one * gain for old, one in zip(self.coefficients, spread, strict=True)]
        self.num_learnt += 1
        learnt = self._forgetting - (1.0 - self._forgetting) / variance if variance > 0.0 else 0.0
        shrink = learnt / (1.0 + learnt * variance)  # negative: more was forgotten than learnt
        self._covariance = [
            [old - left * right * shrink for old, right in zip(row, spread, strict=True)]
            for row, left in zip(self._covariance, spread, strict=True)
        ]
