"""A fit: how long something takes, as a non-negative combination of features, learnt record by record.

1. `predict` gives pace x (weights . features);
2. `learn` looks at how far off that was. What is far from what was seen lately is kept out, unless it goes on;
3. the weights, the shape of the cost, follow slowly: recursive least squares with forgetting, in its information form
   (`_squares` and `_products` fade by FADING a record), of relative errors, so that short times count as much as long;
4. the pace, one factor over all, follows fast: a machine that has become busy is slower at everything.

The weights are found by coordinate descent from where they were, none below 0. What has not been seen for long fades
from both sides of the equations alike and keeps its weight, so there is no covariance that could grow without bound.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import exp, isfinite, log
from operator import mul
from statistics import median

FADING = 0.998  # of a record by each one after it
SWEEPS, YOUNG_SWEEPS = 2, 16  # of coordinate descent for each record, and for each of the first
YOUNG = 128  # records
SHORTEST_S, LONGEST_S = 1e-6, 3600.0  # what is learnt, and what is predicted
LARGEST_FEATURE = 1e6  # features are scaled to the order of 1
TINY = 1e-30  # a square that says nothing
PACE_GAIN = 0.3  # on a host whose neighbours come and go within ten steps, the least error; else a little noise
PACE_LIMIT = log(32.0)
WINDOW = 12  # records by which an outlier is told
FEWEST = 6  # of them
LEAST_SPREAD = 0.5  # of log(measured / predicted): nearer ones are no outliers
SPREADS = 5.0  # median absolute deviations


class Fit:
    """`weights` are the prior, in seconds for one unit of each feature."""

    def __init__(self, weights: Sequence[float]) -> None:
        self._weights = list(weights)
        size = len(self._weights)
        self._squares = [[0.0] * size for _ in range(size)]
        self._products = [0.0] * size
        self._pace = 0.0  # natural logarithm
        self._factor = 1.0  # what that says
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self.num_learnt = 0

    def predict(self, features: Sequence[float]) -> float:
        """Seconds. Finite and above 0 whatever has been learnt."""
        predicted_s = self._factor * self._shape(features)
        return predicted_s if SHORTEST_S < predicted_s < LONGEST_S else min(max(predicted_s, SHORTEST_S), LONGEST_S)

    def learn(self, features: Sequence[float], measured_s: float) -> bool:
        """Take a measurement in; False if it is kept out."""
        if not _is_sane(features, measured_s):
            return False
        if self.num_learnt and self._is_outlier(log(measured_s / self.predict(features))):
            return False
        if not self.num_learnt:  # who is faster than the prior is so at everything
            scale = measured_s / self.predict(features)
            self._weights = [weight * scale for weight in self._weights]
        self.num_learnt += 1
        row = [feature * self._factor / measured_s for feature in features]
        self._take_in(row)
        self._follow(log(measured_s / self.predict(features)))
        return True

    def _shape(self, features: Sequence[float]) -> float:
        if max(features) > LARGEST_FEATURE:
            features = [min(feature, LARGEST_FEATURE) for feature in features]
        return sum(map(mul, self._weights, features))

    def _is_outlier(self, ratio: float) -> bool:
        """All that is seen is remembered, so what was one is none any more when it has become the rule."""
        known = tuple(self._recent)
        self._recent.append(ratio)
        if len(known) < FEWEST:
            return False
        middle = median(known)
        spread = median([abs(one - middle) for one in known])
        return abs(ratio - middle) > max(LEAST_SPREAD, SPREADS * spread)

    def _take_in(self, row: list[float]) -> None:
        """One more equation row . weights = 1."""
        for index, value in enumerate(row):
            self._products[index] = FADING * self._products[index] + value
            squares = self._squares[index]
            for other, second in enumerate(row):
                squares[other] = FADING * squares[other] + value * second
        for _ in range(YOUNG_SWEEPS if self.num_learnt < YOUNG else SWEEPS):
            for index, squares in enumerate(self._squares):
                if squares[index] > TINY:
                    lack = self._products[index] - sum(map(float.__mul__, squares, self._weights))
                    self._weights[index] = max(0.0, self._weights[index] + lack / squares[index])

    def _follow(self, ratio: float) -> None:
        """What the weights do not explain is the pace."""
        self._pace = min(max(self._pace + PACE_GAIN * ratio, -PACE_LIMIT), PACE_LIMIT)
        self._factor = exp(self._pace)


def _is_sane(features: Sequence[float], measured_s: float) -> bool:
    small = all(0 <= feature <= LARGEST_FEATURE for feature in features)
    return small and any(features) and isfinite(measured_s) and SHORTEST_S <= measured_s <= LONGEST_S
