"""Series: what a simulation found, over time. Pure; times in seconds from the first arrival on.

Requests are counted in bins of the time at which they arrived. Workers are added up by role at each look at them, and
looks that lie close are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from cluster.simulator.report.summary import Targets, keeps
from cluster.simulator.results import RequestResult, WorkerSample

Item = TypeVar("Item")

NUM_BINS = 60  # about
MAX_LOOKS = 240  # in a series
ROUND_WIDTHS_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600)


@dataclass(frozen=True, slots=True)
class Bin:
    """Requests that arrived in [begin_s, begin_s + width_s)."""

    begin_s: float
    width_s: float
    requests: tuple[RequestResult, ...]

    @property
    def middle_s(self) -> float:
        return self.begin_s + self.width_s / 2

    @property
    def per_s(self) -> float:
        return len(self.requests) / self.width_s

    def attained(self, targets: Targets) -> float | None:
        """The share that kept the targets; None of nothing."""
        if not self.requests:
            return None
        return sum(keeps(request, targets) for request in self.requests) / len(self.requests)


@dataclass(frozen=True, slots=True)
class PoolLook:
    """All workers of one role, from one time on: how many there were last, and means of what they did."""

    at_s: float
    num_workers: int
    num_running: float
    num_queued: float
    used_share: float  # of all their blocks
    held_share: float  # for hand-offs and reservations; a block that two of them share counts once for each


def bins(requests: Sequence[RequestResult]) -> list[Bin]:
    """All of equal width, from 0 to the last arrival, empty ones too."""
    last_s = max((request.arrived_s for request in requests), default=0.0)
    width_s = bin_width_s(last_s)
    found: list[list[RequestResult]] = [[] for _ in range(1 + math.floor(last_s / width_s))]
    for request in requests:
        found[math.floor(request.arrived_s / width_s)].append(request)
    return [Bin(index * width_s, width_s, tuple(inside)) for index, inside in enumerate(found)]


def bin_width_s(span_s: float) -> float:
    """A round width of which the span has at most NUM_BINS, if any has so few."""
    return next((width_s for width_s in ROUND_WIDTHS_S if span_s / width_s <= NUM_BINS), span_s / NUM_BINS)


def pool_looks(samples: Iterable[WorkerSample]) -> dict[str, list[PoolLook]]:
    """By role, in the order of their first worker. A role nobody has at some time has no workers then."""
    by_time: dict[float, dict[str, list[WorkerSample]]] = {}
    roles: dict[str, None] = {}
    for sample in samples:
        roles.setdefault(str(sample.role))
        by_time.setdefault(sample.at_s, {}).setdefault(str(sample.role), []).append(sample)
    times = list(by_time)
    step = max(1, math.ceil(len(times) / MAX_LOOKS))
    groups = [times[first : first + step] for first in range(0, len(times), step)]
    return {
        role: [_look(group[0], [by_time[at_s].get(role, []) for at_s in group]) for group in groups] for role in roles
    }


def thinned(items: Sequence[Item], most: int) -> Sequence[Item]:
    """At most so many, evenly taken, the first among them."""
    return items[:: math.ceil(len(items) / most)] if items else items


def _look(at_s: float, looks: Sequence[Sequence[WorkerSample]]) -> PoolLook:
    samples = [sample for look in looks for sample in look]
    num_blocks = sum(sample.num_blocks for sample in samples) or 1
    return PoolLook(
        at_s,
        len(looks[-1]),
        sum(sample.num_running for sample in samples) / len(looks),
        sum(sample.num_queued for sample in samples) / len(looks),
        sum(sample.num_blocks - sample.num_free_blocks for sample in samples) / num_blocks,
        sum(sample.num_held_blocks for sample in samples) / num_blocks,
    )
