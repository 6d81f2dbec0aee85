"""DistServe's replanning (OSDI 2024, section 4): each phase's goodput of one worker, replicated to the rate.

Known defects, kept: prefill by M/D/1 at the mean length; a replan reloads weights, which takes a minute, so it is made
only when the rate or a length has moved by a third.
"""

from __future__ import annotations

import math

from cluster.control.planner import Plan
from cluster.control.rivals.moving import Means, largest_batch, machine_of, means, step_s, towards, within
from cluster.control.seen import Seen
from cluster.control.sizing import Machine


class DistServe:
    def __init__(self, interval_s: float = 60.0, moved: float = 0.33) -> None:
        self._interval_s = interval_s
        self._moved = moved
        self._next_at = 0.0
        self._planned: Means | None = None
        self._wanted: int | None = None

    def __call__(self, seen: Seen) -> Plan:
        machine, found = machine_of(seen), means(seen, self._interval_s)
        if machine is None or found is None:
            return Plan("hold: nothing came")
        if seen.now >= self._next_at:
            self._next_at = seen.now + self._interval_s
            if self._planned is None or _has_moved(self._planned, found, self._moved):
                self._planned = found
                self._wanted = within(*_sizes(machine, found), seen.num_workers)
        if self._wanted is None:
            return Plan("hold: no plan yet")
        return towards(seen, self._wanted, f"{self._wanted} prefill workers are planned")


def _has_moved(before: Means, now: Means, part: float) -> bool:
    pairs = (before.rate, now.rate), (before.num_prompt, now.num_prompt), (before.num_output, now.num_output)
    return any(abs(new / max(old, 1e-9) - 1) > part for old, new in pairs)


def _sizes(machine: Machine, found: Means) -> tuple[float, float]:
    """Workers of each phase, as parts."""
    service_s = found.compute_s
    # M/D/1: ttft = D + R D^2 / (2 (1 - R D)), solved for R where it is the target
    spare_s = max(0.0, found.ttft_s - service_s) if math.isfinite(found.ttft_s) else math.inf
    busy = 2 * spare_s / (service_s + 2 * spare_s) if math.isfinite(spare_s) else 0.97
    prefill_rate = max(busy, 0.05) / max(service_s, 1e-9)
    context = found.num_prompt + found.num_output / 2
    size = min(largest_batch(machine, context, found.tpot_s), max(1.0, machine.kv_tokens / context))
    decode_rate = size / (found.num_output * step_s(machine.steps, size, context))
    return found.rate / prefill_rate, found.rate / decode_rate
