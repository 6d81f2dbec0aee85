"""Rates: how many arrivals are expected by a time, for rates that stay, jump, ramp or swing. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol


class Rate(Protocol):
    def expected_by(self, at_s: float) -> float:
        """Arrivals expected from 0 to `at_s`: the integral of the rate, so it never falls."""
        ...


@dataclass(frozen=True, slots=True)
class Steady:
    rate: float  # arrivals/s, as all rates here

    def expected_by(self, at_s: float) -> float:
        return self.rate * at_s


@dataclass(frozen=True, slots=True)
class Ramp:
    """`rate`, then evenly to `to_rate` between `begin_s` and `end_s`, where it stays. Equal times: a step."""

    rate: float
    to_rate: float
    begin_s: float
    end_s: float

    def expected_by(self, at_s: float) -> float:
        before_s = min(at_s, self.begin_s)
        within_s = min(max(0.0, at_s - self.begin_s), self.end_s - self.begin_s)
        after_s = max(0.0, at_s - self.end_s)
        now = self.rate
        if within_s:
            now += (self.to_rate - self.rate) * within_s / (self.end_s - self.begin_s)
        return self.rate * before_s + (self.rate + now) / 2 * within_s + self.to_rate * after_s


@dataclass(frozen=True, slots=True)
class Sine:
    """rate x (1 + amplitude x sin(2 pi t / period)); amplitude from 0 to 1."""

    rate: float
    amplitude: float
    period_s: float

    def expected_by(self, at_s: float) -> float:
        turn = 2 * math.pi / self.period_s
        return self.rate * (at_s + self.amplitude / turn * (1 - math.cos(turn * at_s)))


@dataclass(frozen=True, slots=True)
class Square:
    """`rate` for the first `duty` of each period, `to_rate` for what is left of it."""

    rate: float
    to_rate: float
    period_s: float
    duty: float

    def expected_by(self, at_s: float) -> float:
        num_periods, within_s = divmod(at_s, self.period_s)
        first_s = self.duty * self.period_s
        each = self.rate * first_s + self.to_rate * (self.period_s - first_s)
        return num_periods * each + self.rate * min(within_s, first_s) + self.to_rate * max(0.0, within_s - first_s)
