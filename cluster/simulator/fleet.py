"""A simulated cluster as the controller sees it. Its orders take as long as a message does."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from cluster.sides import WorkerSides
from cluster.simulator.spec import WorldSpec
from engine.errors import Unavailable
from engine.types import Role
from router.api import ControlView
from router.dispatch import Dispatcher
from router.membership import Member
from router.report import GatewayReport

LOOK_S = 0.25


class Worker(Protocol):
    @property
    def sides(self) -> WorkerSides: ...


class FlippableWorld(Protocol):
    """What of a World is changed."""

    spec: WorldSpec
    dispatcher: Dispatcher

    def worker(self, worker_id: str) -> Worker | None:
        """If it lives."""
        ...

    def members(self) -> tuple[Member, ...]: ...

    def relist(self, member: Member) -> None: ...

    async def catch_up(self) -> None: ...


class SimulatedFleet:
    """Implements cluster.control.controller.Fleet."""

    def __init__(self, world: FlippableWorld) -> None:
        self._world = world

    async def reports(self, view: ControlView) -> Sequence[GatewayReport]:
        await asyncio.sleep(self._world.spec.links.latency_s)
        spec = self._world.spec
        token_s = spec.kv_token_bytes / spec.links.bytes_per_s  # workers say what little their states take
        return [replace(self._world.dispatcher.report(view), transfer_token_s=token_s)]

    def members(self) -> tuple[Member, ...]:
        return self._world.members()

    def is_whole(self) -> bool:
        return all(self._world.worker(member.worker_id) is not None for member in self.members())

    def listed(self, worker_id: str) -> Member | None:
        return next((member for member in self.members() if member.worker_id == worker_id), None)

    def relist(self, member: Member) -> None:
        self._world.relist(member)

    async def evacuate(self, member: Member, limit_s: float) -> int:
        await self._world.catch_up()
        return await self._world.dispatcher.evacuate(member.name, limit_s)

    async def relabel(self, member: Member, role: Role, role_epoch: int) -> None:
        (await self._sides(member)).relabel(role, role_epoch)

    async def probe(self, member: Member) -> Member:
        return (await self._sides(member)).member

    async def _sides(self, member: Member) -> WorkerSides:
        await asyncio.sleep(self._world.spec.links.latency_s)
        worker = self._world.worker(member.worker_id)
        if worker is None or worker.sides.member.incarnation != member.incarnation:
            raise Unavailable(f"{member.worker_id} has ended")
        return worker.sides


class RestartingFleet(SimulatedFleet):
    """One whose workers change their pools by ending and beginning anew, as without roles that are labels: what runs
    there ends first, and then nothing runs for `start_s`."""

    def __init__(self, world: FlippableWorld, start_s: float) -> None:
        super().__init__(world)
        self._start_s = start_s

    async def evacuate(self, member: Member, limit_s: float) -> int:
        await self._world.catch_up()
        while self._is_busy(member):  # noqa: ASYNC110 (the end of many streams has no event)
            await asyncio.sleep(LOOK_S)
        await asyncio.sleep(self._start_s)
        return 0

    def _is_busy(self, member: Member) -> bool:
        worker = self._world.worker(member.worker_id)
        if worker is None:
            return False
        status = worker.sides.status()
        return bool(status.num_streams or status.num_queued or status.num_leases or status.num_pulls)
