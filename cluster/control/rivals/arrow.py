"""Arrow (arXiv 2505.11916, algorithms 2 and 3): roles are labels, flipped by the load relative to the targets.

Every second: L_D = resident tokens over the most that keeps TPOT; L_P = queued seconds over the target of TTFT. A
prefill worker goes to decode if L_D >= 1, or if L_P <= 0.5 <= L_D three times in a row; a decode worker to prefill if
L_P >= 1 and L_D < 0.5; after one to decode, 10 s of rest. Flips are as quick as ours. No forecast, no admission.
"""

from __future__ import annotations

from cluster.control.planner import Plan
from cluster.control.rivals.moving import largest_batch, machine_of, means, pool, towards
from cluster.control.seen import Seen
from engine.types import Role

REST_S = 10.0
PASSES = 3


class Arrow:
    def __init__(self, expand: float = 1.0, shrink: float = 0.5) -> None:
        self._expand, self._shrink = expand, shrink
        self._passes = 0
        self._rests_until = 0.0

    def __call__(self, seen: Seen) -> Plan:
        machine, found = machine_of(seen), means(seen, 30.0)
        prefill, decode = pool(seen, Role.PREFILL), pool(seen, Role.DECODE)
        if machine is None or found is None or not prefill or not decode:
            return Plan("hold: nothing came")
        context = found.num_prompt + found.num_output / 2
        most = largest_batch(machine, context, found.tpot_s) * context
        load_d = sum(one.num_tokens for one in decode) / (most * len(decode))
        load_p = min(one.queued_s for one in prefill) / max(found.ttft_s, 1e-9)
        why = f"prefill at {load_p:.2f}, decode at {load_d:.2f} of what keeps the targets"
        self._passes = self._passes + 1 if load_p <= self._shrink <= load_d else 0
        if (load_d >= self._expand or self._passes >= PASSES) and seen.now >= self._rests_until:
            plan = towards(seen, len(prefill) - 1, why)
            if plan.flip is not None:
                self._passes, self._rests_until = 0, seen.now + REST_S
            return plan
        if load_p >= self._expand and load_d < self._shrink:
            return towards(seen, len(prefill) + 1, why)
        return Plan(f"hold: {why}")
