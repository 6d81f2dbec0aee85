"""The simulated cluster of a fault run: each process runs within its own clock, and faults strike at their points."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from cluster.control.flip import flip
from cluster.simulator.faults.loop import fault_loop, within
from cluster.simulator.faults.network import FaultyNetwork
from cluster.simulator.faults.plan import Fault, FaultKind, How, PointKind, ends_of, link
from cluster.simulator.faults.points import Points
from cluster.simulator.fleet import SimulatedFleet
from cluster.simulator.log import EventLog
from cluster.simulator.service_times.model import ServiceTimes, contexts_of
from cluster.simulator.spec import WorldSpec
from cluster.simulator.world import GATEWAY, SimulatedWorker, World
from engine.engine import Engine, EngineSpec
from engine.errors import SteelyardError
from engine.step_shape import StepShape
from engine.types import Role, StepOutputs
from router.membership import Member

EVACUATE_S, FLIP_S = 0.5, 5.0  # of a flip: for what runs to move, and for the whole


class FaultyWorld(World):
    """`cancel` ends an answer by name, as its client (False) or as its gateway (True) would. `on_turn` sees an engine
    after each of its turns."""

    def __init__(
        self, spec: WorldSpec, log: EventLog, points: Points, cancel: Callable[[str, bool], None],
        on_turn: Callable[[Engine], None],
    ) -> None:  # fmt: skip
        self._points = points
        self._cancel = cancel
        self._on_turn = on_turn
        self._wires = FaultyNetwork(spec.links, log, points)
        with within(GATEWAY):
            super().__init__(spec, log, self._wires)

    def strike(self, fault: Fault) -> None:
        """A fault of the cluster. One that cannot be (its target is dead) does nothing."""
        loop = fault_loop()
        self.log.add("fault", fault.kind, target=fault.target, point=str(fault.at))
        match fault.kind:
            case FaultKind.CRASH if fault.target in self.workers:
                self.kill(fault.target)
                if fault.how is How.UNLISTED:
                    self.unlist(fault.target)
                loop.call_later(fault.for_s, self._come_back, fault.target)
            case FaultKind.UNLIST if fault.target in self.workers:
                self.unlist(fault.target)
                loop.call_later(fault.for_s, self._relist, fault.target)
            case FaultKind.CUT:
                sender, receiver = ends_of(fault.target)
                for way in (fault.target, link(receiver, sender))[: 1 + (fault.how is How.BOTH_WAYS)]:
                    self._wires.cut(way)
                    loop.call_later(fault.for_s, self._wires.mend, way)
            case FaultKind.CANCEL:
                with within(GATEWAY):
                    self._cancel(fault.target, fault.how is How.BY_GATEWAY)
            case FaultKind.FLIP if fault.target in self.workers:
                with within(GATEWAY):
                    self.in_background(self._flip(fault.target))
            case FaultKind.LEAVE if fault.target in self.workers:
                with within(GATEWAY):
                    self.in_background(self._leave(fault.target, fault.for_s))
            case FaultKind.SKEW:
                loop.set_clock(fault.at.where, fault.for_s, fault.rate)

    async def _flip(self, worker_id: str) -> None:
        """What goes wrong is undone, and the flip's own to tell."""
        fleet = SimulatedFleet(self)
        member = fleet.listed(worker_id)
        if member is not None:
            to = Role.DECODE if member.role is Role.PREFILL else Role.PREFILL
            with suppress(SteelyardError):
                await flip(fleet, worker_id, member.incarnation, to, EVACUATE_S, FLIP_S)

    async def _leave(self, worker_id: str, limit_s: float) -> None:
        fleet = SimulatedFleet(self)
        member = fleet.listed(worker_id)
        if member is not None:
            await fleet.leave(member, limit_s)
            self._come_back(worker_id)

    def _come_back(self, worker_id: str) -> None:
        if worker_id in self.workers:  # another fault has brought it back
            return
        role, index = worker_id.split("-")
        self.add_worker(Role(role), int(index))

    def _relist(self, worker_id: str) -> None:
        if worker_id in self.workers:
            self._list(worker_id, listed=True)

    # --- parts, each within its process --------------------------------------------------------------------

    def _apply(self, members: list[Member]) -> None:
        with within(GATEWAY):
            super()._apply(members)

    def _make_worker(self, worker_id: str, incarnation: str, role: Role) -> SimulatedWorker:
        with within(worker_id):
            return super()._make_worker(worker_id, incarnation, role)

    def _make_engine(self, _worker_id: str, spec: EngineSpec) -> Engine:
        return _SeenEngine(spec, self._on_turn)

    def _step_times(self, worker_id: str, times: ServiceTimes) -> ServiceTimes:
        return _FaultySteps(times, self._points, worker_id)


class _SeenEngine(Engine):
    """An engine that is looked at after each turn."""

    def __init__(self, spec: EngineSpec, on_turn: Callable[[Engine], None]) -> None:
        super().__init__(spec)
        self._on_turn = on_turn

    def take_outputs(self) -> StepOutputs:
        self._on_turn(self)
        return super().take_outputs()


@dataclass(frozen=True, slots=True)
class _FaultySteps:
    """Implements service_times.model.ServiceTimes: now and then a step is slow."""

    inner: ServiceTimes
    points: Points
    worker_id: str

    def step_s(self, shape: StepShape) -> float:
        faults = self.points.reach(PointKind.STEP, self.worker_id)
        return self.inner.step_s(shape) + sum(fault.for_s for fault in faults if fault.kind is FaultKind.SLOW)

    def decode_steps_s(self, num_decoding: int, num_context: int, num_steps: int) -> list[float]:
        contexts = contexts_of(num_decoding, num_context, num_steps)
        return [self.step_s(StepShape((), num_decoding, context)) for context in contexts]

    def extrapolates(self, shape: StepShape) -> bool:
        return self.inner.extrapolates(shape)
