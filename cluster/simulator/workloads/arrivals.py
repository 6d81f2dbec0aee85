"""Arrival times: random ones of any rate over time and of any burstiness.

1. a renewal process is drawn in a time in which one arrival is expected per unit: `Gaps` say how irregular it is;
2. the rate's integral says at which second that many are expected (a change of time). With exponential gaps that is the
   non-homogeneous Poisson process of this rate; with others, bursts stay bursts however the rate moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from cluster.simulator.chance import Chance
from cluster.simulator.workloads.draws import gamma, weibull
from cluster.simulator.workloads.rates import Rate

NUM_HALVINGS = 60  # of the span in which a time is looked for: an hour to less than a nanosecond


class Gaps(Protocol):
    def draw(self, chance: Chance) -> float:
        """From one arrival to the next, on average 1."""
        ...


@dataclass(frozen=True, slots=True)
class PoissonGaps:
    def draw(self, chance: Chance) -> float:
        return chance.exponential(1.0)


@dataclass(frozen=True, slots=True)
class GammaGaps:
    """`cv`: deviation over mean; 1 is Poisson, more is burstier."""

    cv: float

    def draw(self, chance: Chance) -> float:
        return gamma(chance, self.cv**-2)


@dataclass(frozen=True, slots=True)
class WeibullGaps:
    shape: float

    def draw(self, chance: Chance) -> float:
        return weibull(chance, self.shape)


def arrival_times(rate: Rate, gaps: Gaps, span_s: float, chance: Chance) -> Iterator[float]:
    """Seconds from the start, in order, all before `span_s`."""
    expected, at_s, end = 0.0, 0.0, rate.expected_by(span_s)
    while (expected := expected + gaps.draw(chance)) < end:
        at_s = _when(rate, expected, at_s, span_s)
        yield at_s


def _when(rate: Rate, expected: float, low_s: float, high_s: float) -> float:
    """The time by which so many are expected; it lies between the two."""
    for _ in range(NUM_HALVINGS):
        middle_s = (low_s + high_s) / 2
        if rate.expected_by(middle_s) < expected:
            low_s = middle_s
        else:
            high_s = middle_s
    return low_s
