"""What ledgers say together: T = (W_p + S_p) + (W_d + S_d), and what speeding a stage up would give.

T is a request's time, W and S its waiting and its service at prefill and at decode (DistServe's decomposition, OSDI'24
section 2.3; the shares are read by Amdahl's law). Whatever is neither is shown as the rest, so that all adds up.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engine.errors import InvalidRequest

SPEEDUP = 2.0
PARTS: dict[str, tuple[str, ...]] = {
    "W_p": ("route", "prefill_queue", "recovery"),
    "S_p": ("prepare", "prefill"),
    "W_d": ("transfer", "decode_wait", "stalls", "migration_pause"),
    "S_d": ("steps",),
}
REST = "rest"


@dataclass(frozen=True, slots=True)
class Spread:
    """Of one quantity over requests, in seconds."""

    name: str
    mean_s: float
    p50_s: float
    p90_s: float
    p99_s: float


@dataclass(frozen=True, slots=True)
class StageShare:
    """`share`: of all time. `gain`: T / T' if this stage took half as long, and nothing else changed."""

    stage: str
    share: float
    gain: float


@dataclass(frozen=True, slots=True)
class LedgerReport:
    num_requests: int
    spreads: tuple[Spread, ...]  # T, its parts, and TTFT and TPOT
    stages: tuple[StageShare, ...]  # the largest first


def timelines(text: str) -> list[Mapping[str, object]]:
    """Of a ledger file's lines, or of what /debug/requests answers. Raises InvalidRequest naming the line."""
    told: list[Mapping[str, object]] = []
    for number, line in enumerate(filter(str.strip, text.splitlines()), 1):
        try:
            read = json.loads(line)
            ledgers = [one["timeline"] for one in read.get("requests", [read])]
            if not all(isinstance(one, dict) for one in ledgers):
                raise ValueError
            told += ledgers
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InvalidRequest(f"line {number} is not a ledger") from None
    return told


def report(ledgers: Sequence[Mapping[str, object]]) -> LedgerReport:
    """InvalidRequest if there is none."""
    if not ledgers:
        raise InvalidRequest("there is no ledger to report on")
    stages = [_stages(one) for one in ledgers]
    parts = {name: [sum(one.get(stage, 0.0) for stage in members) for one in stages] for name, members in PARTS.items()}
    totals = [_seconds(one, "e2e_s") for one in ledgers]
    claimed = [sum(values) for values in zip(*parts.values(), strict=True)]
    rest = [max(0.0, total - part) for total, part in zip(totals, claimed, strict=True)]
    spreads = [_spread("T", totals), *(_spread(name, values) for name, values in parts.items()), _spread(REST, rest)]
    for name in ("ttft_s", "tpot_s"):
        values = [_seconds(one, name) for one in ledgers if one.get(name) is not None]
        spreads += [_spread(name.removesuffix("_s").upper(), values)] if values else []
    return LedgerReport(len(ledgers), tuple(spreads), tuple(_shares(stages)))


def _shares(stages: Sequence[Mapping[str, float]]) -> list[StageShare]:
    names = dict.fromkeys(name for one in stages for name in one)
    sums = {name: sum(one.get(name, 0.0) for one in stages) for name in names}
    whole = sum(sums.values()) or 1.0
    shares = {name: value / whole for name, value in sums.items()}
    return [
        StageShare(name, share, 1 / (1 - share + share / SPEEDUP))
        for name, share in sorted(shares.items(), key=lambda item: -item[1])
    ]


def _stages(ledger: Mapping[str, object]) -> dict[str, float]:
    stages = ledger.get("stages")
    if not isinstance(stages, dict):
        raise InvalidRequest("a ledger has no stages")
    return {str(name): float(value) for name, value in stages.items()}


def _seconds(ledger: Mapping[str, object], name: str) -> float:
    value = ledger.get(name)
    if not isinstance(value, int | float):
        raise InvalidRequest(f"a ledger has no {name}")
    return float(value)


def _spread(name: str, values: Iterable[float]) -> Spread:
    array = np.array(list(values))
    p50, p90, p99 = (float(one) for one in np.percentile(array, (50, 90, 99)))
    return Spread(name, float(array.mean()), p50, p90, p99)
