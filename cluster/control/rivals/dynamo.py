"""Dynamo's planners: by load, and by service level (ai-dynamo/dynamo, components/planner).

Known defects, kept: one worker is added or removed at a time, by a start or an end, and none changes its role; the
SLA planner counts requests when they end (issue 8861) and sizes on means.
"""

from __future__ import annotations

import math

from cluster.control.planner import Plan
from cluster.control.rivals.moving import Means, largest_batch, machine_of, means, pool, step_s, towards, within
from cluster.control.seen import Seen
from cluster.control.sizing import Machine
from engine.types import Role


class DynamoLoad:
    """KV use and queued prefills per worker, between an upper and a lower threshold each."""

    def __init__(
        self, interval_s: float = 10.0, kv_up: float = 0.9, kv_down: float = 0.5, queue_up: float = 5.0,
        queue_down: float = 0.2,
    ) -> None:  # fmt: skip
        self._interval_s = interval_s
        self._kv_up, self._kv_down = kv_up, kv_down
        self._queue_up, self._queue_down = queue_up, queue_down
        self._next_at = 0.0

    def __call__(self, seen: Seen) -> Plan:
        prefill, decode = pool(seen, Role.PREFILL), pool(seen, Role.DECODE)
        found = means(seen, 60.0)
        if seen.now < self._next_at or found is None or not prefill or not decode:
            return Plan("hold: between adjustments")
        self._next_at = seen.now + self._interval_s
        kv = sum(1 - one.num_free_blocks / max(1, one.num_blocks) for one in decode) / len(decode)
        queue = sum(one.queued_s for one in prefill) / max(1e-9, found.compute_s) / len(prefill)
        wants_decode, frees_decode = kv > self._kv_up, kv < self._kv_down
        wants_prefill, frees_prefill = queue > self._queue_up, queue < self._queue_down
        step = int(wants_prefill and frees_decode) - int(wants_decode and frees_prefill)
        return towards(seen, len(prefill) + step, f"KV use {kv:.2f}, {queue:.1f} queued prompts a worker")


class DynamoSla:
    """Throughput at the targets, corrected by what was observed."""

    def __init__(self, interval_s: float = 60.0) -> None:
        self._interval_s = interval_s
        self._next_at = 0.0
        self._wanted: int | None = None

    def __call__(self, seen: Seen) -> Plan:
        machine, found = machine_of(seen), means(seen, self._interval_s, at_their_end=True)
        if machine is None or found is None:
            return Plan("hold: nothing came")
        if seen.now >= self._next_at or self._wanted is None:
            self._next_at = seen.now + self._interval_s
            self._wanted = within(*_sizes(machine, found), seen.num_workers)
        return towards(seen, self._wanted, f"{self._wanted} prefill workers are wanted")


def _sizes(machine: Machine, found: Means) -> tuple[float, float]:
    context = found.num_prompt + found.num_output / 2
    size = min(largest_batch(machine, context, found.tpot_s), max(1.0, machine.kv_tokens / context))
    rate_of_one = size / (found.num_output * step_s(machine.steps, size, context))
    return math.ceil(found.rate * found.compute_s), math.ceil(found.rate / rate_of_one)
