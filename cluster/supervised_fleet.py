"""The supervisor's slots as the controller sees them: who is listed, what gateways report, how a worker is flipped."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol, cast

from cluster.slot import Slot
from cluster.spawner import GatewayProcess, WorkerProcess
from cluster.spec import UnitState
from engine.errors import Unavailable
from engine.types import Role
from router.api import ControlView
from router.membership import Member
from router.report import GatewayReport

REPORT_S = 2.0  # a gateway that takes longer has nothing to say this time

log = logging.getLogger(__name__)


class Staff(Protocol):
    """Who has workers come and leave: the supervisor."""

    def add_worker(self, role: Role) -> str: ...

    def remove_worker(self, worker_id: str, incarnation: str, limit_s: float) -> None: ...


class SupervisedFleet:
    """Implements cluster.control.controller.Fleet and cluster.control.drain.Drainable. `workers` are those of now,
    whenever it is asked. `list_members` brings the membership up to the slots."""

    def __init__(
        self, workers: Iterable[Slot], gateways: Sequence[Slot], list_members: Callable[[], None], staff: Staff
    ) -> None:  # fmt: skip
        self._workers = workers
        self._gateways = gateways
        self._list_members = list_members
        self._staff = staff

    async def reports(self, view: ControlView) -> list[GatewayReport]:
        found = await asyncio.gather(*(_report(gateway, view) for gateway in self._serving_gateways()))
        return [report for report in found if report is not None]

    def members(self) -> list[Member]:
        return [slot.member for slot in self._workers if slot.member is not None and not slot.leaves]

    def is_whole(self) -> bool:
        return all(slot.member is not None or slot.leaves or slot.is_new for slot in self._workers)

    def coming(self) -> list[str]:
        return [slot.name for slot in self._workers if slot.member is None and not slot.leaves]

    def new(self) -> list[str]:
        return [slot.name for slot in self._workers if slot.is_new and slot.member is None and not slot.leaves]

    @property
    def num_leaving(self) -> int:
        return sum(slot.leaves for slot in self._workers)

    def add(self, role: Role) -> str:
        return self._staff.add_worker(role)

    def remove(self, worker_id: str, incarnation: str, limit_s: float) -> None:
        self._staff.remove_worker(worker_id, incarnation, limit_s)

    def listed(self, worker_id: str) -> Member | None:
        return self._slot(worker_id).member

    def relist(self, member: Member) -> None:
        self._slot(member.worker_id).member = member
        self._list_members()

    def list_leaving(self) -> None:
        """Whoever began a flip is gone: what it left half done is listed as it was, under a newer epoch."""
        for slot in self._workers:
            if slot.member is not None and slot.member.is_leaving and not slot.leaves:
                slot.member = replace(slot.member, is_leaving=False, role_epoch=slot.member.role_epoch + 2)
        self._list_members()

    async def evacuate(self, member: Member, limit_s: float) -> int:
        left = await asyncio.gather(*(_evacuate(each, member, limit_s) for each in self._serving_gateways()))
        return sum(left)

    async def relabel(self, member: Member, role: Role, role_epoch: int) -> None:
        await self._process(member).relabel(role, role_epoch)

    async def probe(self, member: Member) -> Member:
        return await self._process(member).member()

    async def num_open(self, member: Member) -> int:
        return await self._process(member).num_open()

    def _process(self, member: Member) -> WorkerProcess:
        """Raises Unavailable when this life of it is over."""
        process = self._slot(member.worker_id).process
        if process is None or process.incarnation != member.incarnation:
            raise Unavailable(f"{member.worker_id} has ended")
        return cast(WorkerProcess, process)

    def _slot(self, worker_id: str) -> Slot:
        return next(slot for slot in self._workers if slot.name == worker_id)

    def _serving_gateways(self) -> list[GatewayProcess]:
        running = [slot.process for slot in self._gateways if slot.state == UnitState.RUNNING]
        return [cast(GatewayProcess, process) for process in running if process is not None]


async def _report(gateway: GatewayProcess, view: ControlView) -> GatewayReport | None:
    try:
        async with asyncio.timeout(REPORT_S):
            return await gateway.report(view)
    except TimeoutError:
        log.info("a gateway did not report in time")
    except Exception as error:  # it is just ending, or its fault: the others report
        log.info("a gateway did not report: %s", error)
    return None


async def _evacuate(gateway: GatewayProcess, member: Member, limit_s: float) -> int:
    """What a gateway does not do stays where it is, and is served there."""
    try:
        return await gateway.evacuate(member.name, limit_s)
    except Exception as error:
        log.info("a gateway did not evacuate %s: %s", member.worker_id, error)
        return 0
