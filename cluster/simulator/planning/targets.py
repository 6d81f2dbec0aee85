"""Targets: quantiles of the time to the first token and of the time per token after it, and whether a run kept them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from cluster.simulator.results import RequestResult, SimulationResult
from engine.errors import ConfigError

DEFAULT_PERCENT = 90.0
STEADY = 3.0  # durations of a request (the median) over which arrivals load a cluster about as they would for ever
PATIENT = 5.0  # limits of TTFT over which a queue that grows without end, if a fifth too much comes, exceeds the limit

_TARGET = re.compile(r"(?P<metric>ttft|tpot)(:p(?P<percent>[0-9.]+))?=(?P<limit>[0-9.]+)(?P<unit>ms|s)")


class Metric(StrEnum):
    TTFT = "ttft"
    TPOT = "tpot"


@dataclass(frozen=True, slots=True)
class Target:
    """The quantile (0 to 1) of all requests' `metric` is at most `limit_s`."""

    metric: Metric
    quantile: float
    limit_s: float

    def __str__(self) -> str:
        return f"P{self.quantile * 100:g} {self.metric.upper()} at most {self.limit_s * 1e3:g} ms"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one run. `values_s`: of each target its quantile, infinite where too many requests failed. `attained`: the
    share of requests within all limits. A run whose arrivals span less than `needed_s` is too short to tell what a
    steady load would do."""

    values_s: tuple[float, ...]
    attained: float
    keeps: bool
    extrapolated: float  # share of the steps
    span_s: float
    needed_s: float

    @property
    def is_short(self) -> bool:
        return self.span_s < self.needed_s

    @property
    def serves(self) -> bool:
        """Keeps the targets, for long enough to say so."""
        return self.keeps and not self.is_short


def parse_targets(text: str) -> tuple[Target, ...]:
    """As in "ttft=500ms,tpot:p99=80ms". Raises ConfigError; both metrics must be there."""
    targets = tuple(_parse(part.strip()) for part in text.split(","))
    for metric in Metric:
        if metric not in {target.metric for target in targets}:
            raise ConfigError(f"--slo: {metric} is missing; expected such as ttft=500ms,tpot:p99=80ms, got {text!r}")
    return targets


def _parse(text: str) -> Target:
    match = _TARGET.fullmatch(text)
    try:
        if match is None:
            raise ValueError
        percent = float(match["percent"] or DEFAULT_PERCENT)
        limit_s = float(match["limit"]) / (1e3 if match["unit"] == "ms" else 1.0)
        if not (0 < percent < 100 and limit_s > 0):
            raise ValueError
    except ValueError:
        example = "ttft=500ms or tpot:p99=0.08s"
        raise ConfigError(f"--slo: expected a target such as {example}, got {text!r}") from None
    return Target(Metric(match["metric"]), percent / 100, limit_s)


def judge(result: SimulationResult, targets: Sequence[Target]) -> Verdict:
    """By the targets given: of a phase alone only its own count."""
    values = tuple(_quantile(_values(result, target.metric), target.quantile) for target in targets)
    within = [all(_is_within(one, target) for target in targets) for one in result.requests]
    patience_s = max((target.limit_s for target in targets if target.metric is Metric.TTFT), default=0.0)
    span_s = result.requests[-1].arrived_s - result.requests[0].arrived_s
    durations = sorted(one.ended_s - one.arrived_s for one in result.requests)
    return Verdict(
        values,
        sum(within) / len(within),
        all(value <= target.limit_s for value, target in zip(values, targets, strict=True)),
        result.num_extrapolated / max(1, result.num_steps),
        span_s,
        max(STEADY * durations[len(durations) // 2], PATIENT * patience_s),
    )


def _is_within(request: RequestResult, target: Target) -> bool:
    value = _value(request, target.metric)
    return value is None or value <= target.limit_s


def _values(result: SimulationResult, metric: Metric) -> list[float]:
    found = (_value(request, metric) for request in result.requests)
    return sorted(value for value in found if value is not None)


def _value(request: RequestResult, metric: Metric) -> float | None:
    """Infinite for a request that failed; None for one that has no such time (a single token)."""
    if request.error or request.ttft_s is None:
        return math.inf
    return request.ttft_s if metric is Metric.TTFT else request.tpot_s


def _quantile(rising: Sequence[float], quantile: float) -> float:
    """The least value that so large a part does not exceed; 0 of none."""
    return rising[max(0, math.ceil(quantile * len(rising)) - 1)] if rising else 0.0
