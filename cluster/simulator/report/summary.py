"""The summary of a simulation: its quantiles, how many requests kept the targets, what went wrong. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.simulator.results import RequestResult, SimulationResult

QUANTILES = {"P50": 0.5, "P90": 0.9, "P99": 0.99}


@dataclass(frozen=True, slots=True)
class Targets:
    """None: no target."""

    ttft_s: float | None = None
    tpot_s: float | None = None


@dataclass(frozen=True, slots=True)
class Latency:
    """Quantiles over the requests that have this time, in seconds; None where no request has. `attained`: the share of
    all requests that kept the target, None without one."""

    name: str
    p50_s: float | None
    p90_s: float | None
    p99_s: float | None
    target_s: float | None = None
    attained: float | None = None

    @property
    def quantiles(self) -> tuple[tuple[str, float | None], ...]:
        return tuple(zip(QUANTILES, (self.p50_s, self.p90_s, self.p99_s), strict=True))


@dataclass(frozen=True, slots=True)
class ErrorCount:
    code: str
    count: int


@dataclass(frozen=True, slots=True)
class Summary:
    """`attained`: the share of all requests that kept every target, None without any. Rates are over the span."""

    num_requests: int
    num_finished: int
    errors: tuple[ErrorCount, ...]
    ttft: Latency
    tpot: Latency
    gap: Latency
    attained: float | None
    span_s: float
    requests_per_s: float  # finished
    prompt_tokens_per_s: float  # of requests that gave a token
    output_tokens_per_s: float
    cached_share: float  # of those prompt tokens
    extrapolated_share: float  # of all steps

    @property
    def latencies(self) -> tuple[Latency, ...]:
        return self.ttft, self.tpot, self.gap


def summarise(result: SimulationResult, targets: Targets) -> Summary:
    requests = result.requests
    begun = [request for request in requests if request.num_output]
    num_prompt = sum(request.num_prompt for request in begun)
    span_s = result.span_s or 1.0  # nothing takes no time
    ttft_only, tpot_only = Targets(ttft_s=targets.ttft_s), Targets(tpot_s=targets.tpot_s)
    ttfts = [request.ttft_s for request in requests]
    tpots = [request.tpot_s for request in requests]
    num_finished = sum(map(is_finished, requests))
    return Summary(
        len(requests),
        num_finished,
        tuple(ErrorCount(code, count) for code, count in _error_codes(requests)),
        _latency("TTFT", ttfts, targets.ttft_s, _share(requests, ttft_only)),
        _latency("TPOT", tpots, targets.tpot_s, _share(requests, tpot_only)),
        _latency("hand-off gap", [request.gap_s for request in requests]),
        _share(requests, targets),
        result.span_s,
        num_finished / span_s,
        num_prompt / span_s,
        sum(request.num_output for request in requests) / span_s,
        sum(request.cached_tokens for request in begun) / num_prompt if num_prompt else 0.0,
        result.num_extrapolated / result.num_steps if result.num_steps else 0.0,
    )


def is_finished(request: RequestResult) -> bool:
    """Did it get all that it asked for?"""
    return not request.error and request.num_output >= request.num_wanted


def keeps(request: RequestResult, targets: Targets) -> bool:
    """One that ended early keeps no target; an answer of one token has no TPOT to miss."""
    if not is_finished(request) or request.ttft_s is None:
        return False
    in_time = targets.ttft_s is None or request.ttft_s <= targets.ttft_s
    return in_time and (targets.tpot_s is None or request.tpot_s is None or request.tpot_s <= targets.tpot_s)


def quantile(values: Sequence[float], part: float) -> float | None:
    """Linear between neighbours, as numpy's default; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    low, share = divmod(part * (len(ordered) - 1), 1)
    upper = ordered[min(int(low) + 1, len(ordered) - 1)]
    return ordered[int(low)] + share * (upper - ordered[int(low)])


def known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _latency(
    name: str, values: Iterable[float | None], target_s: float | None = None, attained: float | None = None
) -> Latency:
    there = known(values)
    p50_s, p90_s, p99_s = (quantile(there, part) for part in QUANTILES.values())
    return Latency(name, p50_s, p90_s, p99_s, target_s, attained)


def _share(requests: Sequence[RequestResult], targets: Targets) -> float | None:
    if targets == Targets() or not requests:
        return None
    return sum(keeps(request, targets) for request in requests) / len(requests)


def _error_codes(requests: Iterable[RequestResult]) -> list[tuple[str, int]]:
    """By how often, then by name."""
    codes = Counter(request.error for request in requests if request.error)
    return sorted(codes.items(), key=lambda item: (-item[1], item[0]))
