"""How far first tokens came from when they were predicted, of late: what admission adds to a prediction.

A sliding window of forecasts and what came of them. Both measures are kept, as a factor and in seconds; short waits are
off by a factor and long ones by seconds, so of one prediction the lesser counts.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

from router.policies.snapshot import Margin

WINDOW = 256  # first tokens
COVERED = 0.995  # of them, by each measure: 99 % is promised, and the lesser of two covers fewer than either
FIRST_FACTOR, FIRST_ADDED_S = 1.1, 0.1  # as long as there are too few
LEAST_FACTOR, LEAST_ADDED_S = 1.02, 0.02  # however good they were: the worst of a hundred is worse
FEWEST = 16
STEP_FACTOR = 1.05


class TtftErrors:
    def __init__(self) -> None:
        self._factors = _Window()
        self._added = _Window()
        self.margin = Margin(FIRST_FACTOR, FIRST_ADDED_S, STEP_FACTOR)

    def add(self, predicted_s: float, actual_s: float) -> None:
        if predicted_s <= 0:
            return
        self._factors.add(actual_s / predicted_s)
        self._added.add(actual_s - predicted_s)
        if len(self._factors) >= FEWEST:
            factor, added_s = self._factors.covering, self._added.covering
            self.margin = Margin(max(LEAST_FACTOR, factor), max(LEAST_ADDED_S, added_s), STEP_FACTOR)


class _Window:
    """The last values, in order as well, so that each costs a search and not a sort."""

    def __init__(self) -> None:
        self._values: deque[float] = deque()
        self._ordered: list[float] = []

    def __len__(self) -> int:
        return len(self._values)

    def add(self, value: float) -> None:
        if len(self._values) == WINDOW:
            del self._ordered[bisect_left(self._ordered, self._values.popleft())]
        self._values.append(value)
        insort(self._ordered, value)

    @property
    def covering(self) -> float:
        """The least that COVERED of them do not exceed."""
        return self._ordered[int(COVERED * (len(self._ordered) - 1))]
