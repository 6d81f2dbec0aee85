"""Tenants: what each has been served, in weighted tokens, so that the queue can be fair between them. Pure.

Virtual token counters (Sheng et al., Fairness in Serving Large Language Models, OSDI 2024, algorithm 2):
1. `arrive` when a tenant had nothing in the queue: its counter is lifted to the least of those that have, or, of an
   empty queue, to that of the last one that left it. What was not asked for is not saved up;
2. `charge` for a prompt when it is given to the engine, and for generated tokens as they come out of it.
Of two tenants that always have something in the queue, neither is served more than the other by more than what the
queue tolerates and one charge.
"""

from __future__ import annotations

from collections.abc import Collection

MAX_IDLE = 4096  # tenants whose counters are remembered while they have nothing in the queue


class Tenants:
    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._last_left = 0.0

    def served(self, tenant: str) -> float:
        return self._served.get(tenant, 0.0)

    def arrive(self, tenant: str, others: Collection[str]) -> None:
        """`others`: those that have something in the queue, among which it is not."""
        floor = min(map(self.served, others), default=self._last_left)
        lifted = max(self._served.pop(tenant, 0.0), floor)
        if len(self._served) >= MAX_IDLE:
            self._forget_idle(others)
        self._served[tenant] = lifted  # the last that arrived stands last

    def leave(self, tenant: str) -> None:
        """It has nothing in the queue any more."""
        self._last_left = self.served(tenant)

    def charge(self, tenant: str, tokens: float) -> None:
        """`tokens`: weighted."""
        self._served[tenant] = self.served(tenant) + tokens

    def _forget_idle(self, active: Collection[str]) -> None:
        """Those that have not come for longest. When they come again, they begin as new ones do."""
        idle = [tenant for tenant in self._served if tenant not in active]
        for tenant in idle[: len(self._served) + 1 - MAX_IDLE]:
            del self._served[tenant]
