"""Lengths: how many tokens prompts and outputs have.

Written as `1024`, `uniform:100:2000`, `lognormal:900:0.8` (mean, and deviation of the logarithm) or
`moving:500:2000:0.5` (a lognormal whose mean goes evenly from one to the other).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from cluster.simulator.chance import Chance
from cluster.simulator.workloads.draws import lognormal
from cluster.simulator.workloads.workload import Workload

GRAMMAR = "a number of tokens, uniform:LOW:HIGH, lognormal:MEAN:SIGMA or moving:FROM:TO:SIGMA"


class Lengths(Protocol):
    def draw(self, progress: float, chance: Chance) -> int:
        """At least 1. `progress`: how much of the workload's span has passed, 0 to 1."""
        ...


@dataclass(frozen=True, slots=True)
class Constant:
    tokens: int

    def draw(self, progress: float, chance: Chance) -> int:
        return self.tokens


@dataclass(frozen=True, slots=True)
class Uniform:
    """Both ends included."""

    low: int
    high: int

    def draw(self, progress: float, chance: Chance) -> int:
        return chance.between(self.low, self.high)


@dataclass(frozen=True, slots=True)
class Moving:
    """Lognormal; its mean goes evenly from `mean` to `to_mean`."""

    mean: float
    to_mean: float
    sigma: float

    def draw(self, progress: float, chance: Chance) -> int:
        mean = self.mean + (self.to_mean - self.mean) * progress
        return max(1, round(lognormal(chance, mean, self.sigma)))


class LengthPairs(Protocol):
    def draw(self, progress: float, chance: Chance) -> tuple[int, int]:
        """(prompt, output) of one request."""
        ...


@dataclass(frozen=True, slots=True)
class Independent:
    prompt: Lengths
    output: Lengths

    def draw(self, progress: float, chance: Chance) -> tuple[int, int]:
        return self.prompt.draw(progress, chance), self.output.draw(progress, chance)


@dataclass(frozen=True, slots=True)
class Empirical:
    """Those of a request of a trace, any of them: a long prompt keeps its output."""

    pairs: tuple[tuple[int, int], ...]

    def draw(self, progress: float, chance: Chance) -> tuple[int, int]:
        return self.pairs[chance.below(len(self.pairs))]


def lengths_of(trace: Workload) -> Empirical:
    return Empirical(tuple((arrival.num_prompt, arrival.num_output) for arrival in trace.arrivals))


def parse_lengths(text: str) -> Lengths:
    """Raises ValueError that says what is wrong."""
    kind, *values = text.split(":")
    try:
        match kind, values:
            case "uniform", [low, high]:
                return _checked(Uniform(int(low), int(high)), 1 <= int(low) <= int(high))
            case "lognormal", [mean, sigma]:
                return _checked(Moving(float(mean), float(mean), float(sigma)), _fits(mean, sigma))
            case "moving", [mean, to_mean, sigma]:
                fits = _fits(mean, sigma) and _fits(to_mean, sigma)
                return _checked(Moving(float(mean), float(to_mean), float(sigma)), fits)
            case tokens, []:
                return _checked(Constant(int(tokens)), int(tokens) >= 1)
    except ValueError:
        pass
    raise ValueError(f"expected {GRAMMAR}, got {text!r}")


def _checked(lengths: Lengths, fits: bool) -> Lengths:
    if not fits:
        raise ValueError
    return lengths


def _fits(mean: str, sigma: str) -> bool:
    return 1 <= float(mean) <= 1e7 and 0 <= float(sigma) <= 5
