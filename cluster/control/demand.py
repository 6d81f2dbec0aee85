"""Demand: what came in a window of time, in the form in which pools are sized for it. Pure.

1. `demand_of` takes a sample of the arrivals of a window and sorts them into kinds of about equal length, so that
   sizing sees the distribution and not its mean: waits follow from the variance of service times;
2. `scaled` makes of it what is forecast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from router.arrivals import Arrived

MOST_KINDS = 48
FEWEST_PARTS = 4
LEAST_BURSTINESS, MOST_BURSTINESS = 1.0, 20.0  # of arrivals: never better than Poisson is believed


@dataclass(frozen=True, slots=True)
class Kind:
    """Requests that are alike; `share` of all. The other numbers are means, targets those of the tightest tenth."""

    share: float
    num_prompt: float
    num_output: float
    compute_s: float
    ttft_s: float
    tpot_s: float
    num_new: float = 0.0  # of the prompt's tokens, those that nobody has cached


@dataclass(frozen=True, slots=True)
class Demand:
    """`rate` in requests/s; `burstiness`: squared coefficient of variation of the times between arrivals (1:
    Poisson)."""

    rate: float
    burstiness: float
    kinds: tuple[Kind, ...]
    cached_share: float = 0.0  # of the prompts' tokens

    @property
    def compute_s(self) -> float:
        """Of a mean prompt."""
        return sum(kind.share * kind.compute_s for kind in self.kinds)

    @property
    def num_output(self) -> float:
        return sum(kind.share * kind.num_output for kind in self.kinds)

    def scaled(self, rate: float, compute: float = 1.0, output: float = 1.0) -> Demand:
        """At another rate, and with prompts and answers so many times as long."""
        kinds = tuple(
            replace(
                kind,
                compute_s=kind.compute_s * compute,
                num_new=kind.num_new * compute,
                num_output=max(1.0, kind.num_output * output),
            )
            for kind in self.kinds
        )
        return replace(self, rate=rate, kinds=kinds)


def demand_of(sample: Sequence[Arrived], rate: float, burstiness: float = LEAST_BURSTINESS) -> Demand | None:
    """Of a fair sample of what came. None: nothing did."""
    if not sample or not rate > 0:
        return None
    ordered = sorted(sample, key=lambda one: (one.compute_s, one.num_output, one.at))
    num_kinds = min(MOST_KINDS, len(ordered))
    bounds = [len(ordered) * index // num_kinds for index in range(num_kinds + 1)]
    groups = [ordered[low:high] for low, high in pairwise(bounds)]
    kinds = tuple(_kind(group, len(ordered)) for group in groups)
    num_tokens = max(1, sum(one.num_prompt for one in ordered))
    return Demand(rate, burstiness, kinds, sum(one.num_cached for one in ordered) / num_tokens)


def _kind(group: Sequence[Arrived], num_all: int) -> Kind:
    size = len(group)
    return Kind(
        size / num_all,
        sum(one.num_prompt for one in group) / size,
        sum(one.num_output for one in group) / size,
        sum(one.compute_s for one in group) / size,
        _tight([one.ttft_s for one in group]),
        _tight([one.tpot_s for one in group]),
        sum(one.num_prompt - one.num_cached for one in group) / size,
    )


def _tight(targets: Sequence[float]) -> float:
    return sorted(targets)[len(targets) // 10]


def burstiness_of(counts: Sequence[int]) -> float:
    """By how many came in equal parts of a window: their variance over their mean is what times between arrivals show
    of a renewal process in the long run; these themselves miss what goes on for longer than a few arrivals."""
    mean = sum(counts) / max(1, len(counts))
    if len(counts) < FEWEST_PARTS or mean <= 0:
        return LEAST_BURSTINESS
    variance = sum((count - mean) ** 2 for count in counts) / (len(counts) - 1)
    return min(MOST_BURSTINESS, max(LEAST_BURSTINESS, variance / mean))
