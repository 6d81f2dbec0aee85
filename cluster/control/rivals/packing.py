"""Bin packing in the manner of Llumnix (OSDI 2024): decode takes as few workers as hold its KV, prefill gets the rest.

Llumnix moves requests together by migration and scales by the freeness of workers; here a decode worker that the others
could empty at `full` of their blocks goes to prefill while prompts queue, and one comes back when they are fuller.
Known defect, kept: it goes by memory, so steps become as long as memory lets them.
"""

from __future__ import annotations

from cluster.control.planner import Plan
from cluster.control.rivals.moving import means, pool, towards
from cluster.control.seen import Seen
from engine.types import Role


class Packing:
    def __init__(self, full: float = 0.8, queued: float = 1.0) -> None:
        self._full = full
        self._queued = queued  # mean prompts, in the shortest queue

    def __call__(self, seen: Seen) -> Plan:
        prefill, decode, found = pool(seen, Role.PREFILL), pool(seen, Role.DECODE), means(seen, 30.0)
        if found is None or not prefill or not decode:
            return Plan("hold: nothing came")
        used = sum(1 - one.num_free_blocks / max(1, one.num_blocks) for one in decode)
        queue = min(one.queued_s for one in prefill) / max(found.compute_s, 1e-9)
        why = f"{used:.2f} workers' blocks are used, {queue:.1f} prompts queue"
        if used > self._full * len(decode):
            return towards(seen, len(prefill) - 1, why)
        if len(decode) > 1 and queue > self._queued and used < self._full * (len(decode) - 1):
            return towards(seen, len(prefill) + 1, why)
        return Plan(f"hold: {why}")
