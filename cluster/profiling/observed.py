"""What a profile has observed, as plain records; and what follows from them by itself. Pure.

How long steps of other shapes take is a service-time model's business (cluster/simulator/service_times).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import median

from cluster.simulator.host import Slowdown
from cluster.simulator.service_times.model import ServiceTimes
from engine.step_shape import StepRecord

SLOWEST_LINK = 1e6  # bytes per second: what is assumed where transfers are too short to tell
FASTEST_LINK = 1e12


@dataclass(frozen=True, slots=True)
class Probe:
    """One request alone on a quiet cluster. `prefill_s`: all steps of its prompt; `decode_s`: those of `num_decoded`
    tokens; `late_bytes`: KV of the last chunk; all but its last layers may have moved while it was computed."""

    first_s: float
    end_s: float
    prefill_s: float
    decode_s: float
    num_decoded: int
    late_bytes: int

    @property
    def front_s(self) -> float:
        """Before the first token, outside of steps."""
        return self.first_s - self.prefill_s

    @property
    def gap_s(self) -> float:
        """From the first token to the last, outside of steps. Below 0 where decode began before the first was read."""
        return self.end_s - self.first_s - self.decode_s


@dataclass(slots=True)
class Observed:
    """`alone`: steps while the other worker did nothing; `beside`: while it computed."""

    alone: list[StepRecord] = field(default_factory=list)
    beside: list[StepRecord] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Link:
    latency_s: float
    bytes_per_s: float


def link_of(probes: Sequence[Probe]) -> Link:
    """The gap of a short answer is a latency and the time of the late bytes: the median slope between any two (Theil
    and Sen), and the median of what is left."""
    short = [probe for probe in probes if probe.num_decoded == 1]
    slopes = [
        (two.gap_s - one.gap_s) / (two.late_bytes - one.late_bytes)
        for one, two in combinations(short, 2)
        if two.late_bytes != one.late_bytes
    ]
    byte_s = min(max(median(slopes), 1 / FASTEST_LINK), 1 / SLOWEST_LINK) if slopes else 1 / FASTEST_LINK
    left = [probe.gap_s - byte_s * probe.late_bytes for probe in short]
    return Link(max(0.0, median(left)), 1 / byte_s)


def gateway_s_of(probes: Sequence[Probe], link: Link) -> float:
    """Before a first token, outside of steps and of the two ways between gateway and worker."""
    return max(0.0, median(probe.front_s for probe in probes) - 2 * link.latency_s)


def token_s_of(probes: Sequence[Probe], link: Link) -> float:
    """Of each token after the second, outside of its step; 0 where steps follow each other without a pause."""
    left = [
        (probe.gap_s - link.latency_s - probe.late_bytes / link.bytes_per_s) / (probe.num_decoded - 1)
        for probe in probes
        if probe.num_decoded > 1
    ]
    return max(0.0, median(left)) if left else 0.0


def slowdown_of(beside: Sequence[StepRecord], alone: ServiceTimes) -> Slowdown:
    """All steps of a phase together, over what they take alone; at least 1. Sums, not medians: a stream's pace is that
    of all its steps, the slow ones included."""
    ratios = {}
    for has_chunks in (True, False):
        steps = [step for step in beside if bool(step.shape.chunks) == has_chunks]
        alone_s = sum(alone.step_s(step.shape) for step in steps)
        ratios[has_chunks] = max(1.0, sum(step.step_s for step in steps) / alone_s) if steps else 1.0
    return Slowdown(prefill=ratios[True], decode=ratios[False])
