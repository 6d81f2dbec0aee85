"""Spreading: what to do with a trace whose times are rounded, so that requests come in batches that never were.

A batch (requests of the same time) is spread over the window until the next one could come.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from enum import StrEnum
from itertools import pairwise

from cluster.simulator.chance import Chance
from cluster.simulator.workloads.workload import Workload

ROUNDED_S = 1.0  # times that lie so far apart at least have been rounded


class Spread(StrEnum):
    JITTER = "jitter"  # at random, as if the batch had come as a Poisson process does
    EVEN = "even"
    NONE = "none"


def spread(workload: Workload, how: Spread, chance: Chance) -> Workload:
    """The same where times have not been rounded."""
    window_s = rounded_to_s(workload)
    if how is Spread.NONE or window_s < ROUNDED_S:
        return workload
    sizes = Counter(arrival.at_s for arrival in workload.arrivals)  # in order of time
    times = (at_s + window_s * part for at_s, size in sizes.items() for part in _parts(size, how, chance))
    arrivals = (replace(arrival, at_s=at_s) for arrival, at_s in zip(workload.arrivals, times, strict=True))
    return replace(workload, arrivals=tuple(sorted(arrivals, key=lambda arrival: arrival.at_s)))


def rounded_to_s(workload: Workload) -> float:
    """The shortest time between two requests that did not come at the same time; 0 if all did."""
    times = sorted({arrival.at_s for arrival in workload.arrivals})
    return min((later - earlier for earlier, later in pairwise(times)), default=0.0)


def _parts(size: int, how: Spread, chance: Chance) -> list[float]:
    """Where in the window each of a batch comes, 0 to 1, in order."""
    if how is Spread.EVEN:
        return [index / size for index in range(size)]
    return sorted(chance.unit() for _ in range(size))
