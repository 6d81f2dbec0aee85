"""DOPD (arXiv 2511.20982): a ratio at which prefill just keeps decode busy. As released, and corrected.

As released (liao4s/DOPD, planner_dopd.py):
  C = blocks // blocks of one sequence;  n_P = ceil(C ttft / (osl tpot(C)));  n_D = ceil(requests of an interval / C)
Known defects, kept: n_P is what one decode worker keeps busy, and is not multiplied by n_D; n_D divides a count by a
concurrency; C knows memory alone, and no target; requests are counted when they end; lengths are means.
Corrected: Little's law for n_D with the C that keeps TPOT as well, n_P by load, requests counted when they come.
"""

from __future__ import annotations

import math

from cluster.control.planner import Plan
from cluster.control.rivals.moving import Means, largest_batch, machine_of, means, step_s, towards, within
from cluster.control.seen import Seen
from cluster.control.sizing import Machine

BLOCK = 128  # tokens; hard-coded there


class Dopd:
    """`interval_s`: of adjustments (20 s as shipped). `busy`: of prefill workers, where it is corrected."""

    def __init__(self, interval_s: float = 20.0, busy: float = 0.8, *, corrected: bool = False) -> None:
        self._interval_s = interval_s
        self._busy = busy
        self._corrected = corrected
        self._next_at = 0.0
        self._wanted: int | None = None

    def __call__(self, seen: Seen) -> Plan:
        machine, found = machine_of(seen), means(seen, self._interval_s, at_their_end=not self._corrected)
        if machine is None or found is None:
            return Plan("hold: nothing came")
        if seen.now >= self._next_at or self._wanted is None:
            self._next_at = seen.now + self._interval_s
            sizes = _released(machine, found, self._interval_s)
            if self._corrected:
                sizes = _corrected(machine, found, self._busy)
            self._wanted = within(*sizes, seen.num_workers)
        return towards(seen, self._wanted, f"{self._wanted} prefill workers are wanted")


def _released(machine: Machine, found: Means, interval_s: float) -> tuple[float, float]:
    most = _by_memory(machine, found)
    tpot_s = step_s(machine.steps, most, found.num_prompt + found.num_output / 2)
    num_prefill = math.ceil(most * found.compute_s / (found.num_output * tpot_s))
    return max(1, num_prefill), max(1, math.ceil(found.rate * interval_s / most))


def _corrected(machine: Machine, found: Means, busy: float) -> tuple[float, float]:
    context = found.num_prompt + found.num_output / 2
    most = min(_by_memory(machine, found), largest_batch(machine, context, found.tpot_s))
    tpot_s = step_s(machine.steps, most, context)
    return found.rate * found.compute_s / busy, found.rate * found.num_output * tpot_s / most


def _by_memory(machine: Machine, found: Means) -> float:
    num_blocks = math.ceil((found.num_prompt + found.num_output / 2) / BLOCK)
    return max(1.0, min(machine.kv_tokens / BLOCK // num_blocks, machine.max_batch_seqs))
