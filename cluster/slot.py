"""A slot: one process that should be there, whichever incarnation of it is."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.spawner import Process
from cluster.spec import UnitState, UnitStatus
from router.membership import Member


@dataclass(slots=True)
class Slot:
    name: str
    state: UnitState = UnitState.STARTING
    process: Process | None = None
    member: Member | None = None  # listed, if set
    num_starts: int = 0
    num_failures: int = 0  # in a row; see cluster.supervisor.STEADY_S
    settled: bool = False  # its first incarnation has started or failed
    proved: bool = False  # of a gateway: a canary has come back
    serving_since: float | None = None  # loop time
    leaves: bool = False  # for good
    is_new: bool = False  # it was added, and has not served yet
    reason: str = ""

    def status(self) -> UnitStatus:
        incarnation = self.process.incarnation if self.process else ""
        role = str(self.member.role) if self.member is not None else ""
        state = UnitState.LEAVING if self.leaves else self.state
        return UnitStatus(self.name, state, incarnation, max(0, self.num_starts - 1), self.reason, role)
