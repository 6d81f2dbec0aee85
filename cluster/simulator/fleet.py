"""A simulated cluster as the controller sees it. Its orders take as long as a message does, and a worker that comes
takes as long as the spec says."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from cluster.control.drain import drain
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

    def add_worker(self, role: Role, index: int = 0) -> Worker: ...

    def retire(self, worker_id: str) -> None:
        """It ends, and the membership goes on without it."""
        ...

    def in_background(self, work: Coroutine[None, None, None]) -> None:
        """Until the world is closed, which raises what it raised."""
        ...

    async def catch_up(self) -> None: ...


class SimulatedFleet:
    """Implements cluster.control.controller.Fleet and cluster.control.drain.Drainable."""

    def __init__(self, world: FlippableWorld) -> None:
        self._world = world
        self._coming: list[str] = []
        self._leaving: set[str] = set()

    async def reports(self, view: ControlView) -> Sequence[GatewayReport]:
        await asyncio.sleep(self._world.spec.links.latency_s)
        spec = self._world.spec
        token_s = spec.kv_token_bytes / spec.links.bytes_per_s  # workers say what little their states take
        return [replace(self._world.dispatcher.report(view), transfer_token_s=token_s)]

    def members(self) -> tuple[Member, ...]:
        return tuple(member for member in self._world.members() if member.worker_id not in self._leaving)

    def is_whole(self) -> bool:
        return all(self._world.worker(member.worker_id) is not None for member in self.members())

    def coming(self) -> list[str]:
        return self._coming

    def new(self) -> list[str]:
        return self._coming

    @property
    def num_leaving(self) -> int:
        return len(self._leaving)

    def add(self, role: Role) -> str:
        taken = {member.worker_id for member in self._world.members()} | set(self._coming)
        index = next(number for number in range(len(taken) + 1) if f"{role}-{number}" not in taken)
        self._coming.append(f"{role}-{index}")
        self._world.in_background(self._come(role, index))
        return self._coming[-1]

    async def _come(self, role: Role, index: int) -> None:
        await asyncio.sleep(self._world.spec.start_s)
        name = f"{role}-{index}"
        if name in self._coming:  # it is still wanted
            self._coming.remove(name)
            self._world.add_worker(role, index)

    def remove(self, worker_id: str, incarnation: str, limit_s: float) -> None:
        member = self.listed(worker_id)
        if not incarnation and worker_id in self._coming:
            self._coming.remove(worker_id)
        elif member is not None and member.incarnation == incarnation:
            self._leaving.add(worker_id)
            self._world.in_background(self.leave(member, limit_s))

    async def leave(self, member: Member, limit_s: float) -> None:
        """Returns when it has."""
        with suppress(Unavailable):  # it died
            await drain(self, member, limit_s)
        await self._world.catch_up()
        worker = self._world.worker(member.worker_id)
        if worker is not None and worker.sides.member.incarnation == member.incarnation:
            self._world.retire(member.worker_id)
        self._leaving.discard(member.worker_id)

    async def num_open(self, member: Member) -> int:
        await self._world.catch_up()
        return (await self._sides(member)).status().num_open

    def listed(self, worker_id: str) -> Member | None:
        return next((member for member in self._world.members() if member.worker_id == worker_id), None)

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
        return bool(worker.sides.status().num_open)
