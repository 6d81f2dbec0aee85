"""The points of a run: counted as they are reached, with the faults that strike there.

1. whoever comes to a point says so by `reach`, and gets the faults that are about the thing itself (a message, a step,
   a timer);
2. faults of the cluster (a crash, a cut, ...) are given to `strike`, before anything else happens;
3. `stop` ends it: no more faults, and no more counting. `census` then says which points there were.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextvars import Context
from dataclasses import dataclass

from cluster.simulator.faults.plan import Fault, FaultKind, Plan, PointKind

Place = tuple[PointKind, str]

OF_THE_CLUSTER = (
    FaultKind.CRASH, FaultKind.UNLIST, FaultKind.CANCEL, FaultKind.CUT, FaultKind.SKEW, FaultKind.FLIP, FaultKind.LEAVE,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Census:
    """How many points there were in each place, in the order in which they were first reached; of messages also what
    they were."""

    counts: tuple[tuple[Place, int], ...]
    messages: tuple[tuple[str, tuple[str, ...]], ...]  # (link, what each was)


class Points:
    def __init__(self, plan: Plan, strike: Callable[[Fault], None]) -> None:
        self._strike = strike
        self._counts: dict[Place, int] = {}
        self._messages: dict[str, list[str]] = {}
        self._due: dict[Place, dict[int, list[Fault]]] = {}
        for fault in plan:
            place = (fault.at.kind, fault.at.where)
            self._due.setdefault(place, {}).setdefault(fault.at.number, []).append(fault)
        self._stopped = False
        self.has_struck = False  # has any fault?

    def reach(self, kind: PointKind, where: str) -> Iterable[Fault]:
        """The faults of the thing itself that is now done here."""
        if self._stopped:
            return ()
        place = (kind, where)
        number = self._counts.get(place, 0)
        self._counts[place] = number + 1
        if place not in self._due or number not in self._due[place]:
            return ()
        self.has_struck = True
        faults = self._due[place][number]
        for fault in faults:
            if fault.kind in OF_THE_CLUSTER:
                asyncio.get_running_loop().call_soon(self._strike, fault, context=Context())
        return [fault for fault in faults if fault.kind not in OF_THE_CLUSTER]

    def reach_message(self, link: str, what: str) -> Iterable[Fault]:
        if not self._stopped:
            self._messages.setdefault(link, []).append(what)
        return self.reach(PointKind.MESSAGE, link)

    def stop(self) -> None:
        self._stopped = True

    def census(self) -> Census:
        messages = tuple((link, tuple(whats)) for link, whats in self._messages.items())
        return Census(tuple(self._counts.items()), messages)
