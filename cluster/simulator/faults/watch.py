"""The watch over a fault run: checks the invariants at every event, and ends the run at the first violation.

1. `on_turn` after each turn of an engine: its blocks;
2. `on_quiet` whenever nothing more happens at a time: leases, transfers, epochs, deadlines, and work for nobody;
3. `found` is called by whoever sees something else that may not be. The next `on_quiet` raises it.
"""

from __future__ import annotations

from collections.abc import Iterable

from cluster.simulator.faults import invariants
from cluster.simulator.faults.invariants import Violation
from cluster.simulator.faults.loop import fault_loop
from cluster.simulator.faults.plan import LASTING, FaultKind, Plan, lasting_s
from cluster.simulator.faults.points import Points
from cluster.simulator.world import GATEWAY, SimulatedWorker, World
from engine.engine import Engine
from engine.types import Key

DEADLINE_PATIENCE_S = 1e-6  # rounding
LEASE_PATIENCE_HEARTBEATS = 2.01  # a worker looks once a heartbeat, after a round of heartbeats of its own
STRAY_S = 0.5  # the gateway's word gets there and the step ends, where nothing goes wrong
STRAY_AFTER_FAULTS_S = 12.0  # a silence is noticed (5 s), a stream comes back (2 s), an orphan is let go (4 s)


class Violated(Exception):
    def __init__(self, violation: Violation) -> None:
        super().__init__(str(violation))
        self.violation = violation


class Watch:
    def __init__(self, plan: Plan, points: Points) -> None:
        self._points = points
        self._lasting_s = lasting_s(plan, *LASTING)
        self._late_s = lasting_s(plan, FaultKind.LATE)
        self.world: World | None = None
        self.violation: Violation | None = None
        self._epochs: dict[str, int] = {}
        self._first_epochs: dict[str, int] = {}  # of each request's present placement
        self._unwanted: dict[tuple[str, Key], float] = {}  # since when (true time)

    def found(self, invariant: str, message: str) -> None:
        """The first one counts."""
        if self.violation is None:
            self.violation = Violation(invariant, message, fault_loop().true_s)

    def last_epoch(self, request_id: str) -> int:
        """The first of its placement, when last nothing more happened. Whoever reads at once gets nothing from before
        it."""
        return self._first_epochs.get(request_id, 0)

    def on_turn(self, engine: Engine) -> None:
        self._all("blocks", invariants.block_faults(engine))
        self._all("sharing", invariants.sharing_faults(engine))

    def on_quiet(self) -> None:
        """Raises Violated."""
        if self.violation is None and self.world is not None:
            self._look(self.world)
        if self.violation is not None:
            raise Violated(self.violation)

    def _look(self, world: World) -> None:
        """Where there is nothing, nothing can be wrong: most of the time most tables are empty."""
        loop, dispatcher = fault_loop(), world.dispatcher
        if dispatcher._live:
            self._all("epochs", invariants.epoch_faults(dispatcher, self._epochs))
            self._first_epochs |= {name: live.first_epoch for name, live in dispatcher._live.items()}
            self._all("deadlines", invariants.deadline_faults(dispatcher, loop.time_of(GATEWAY), DEADLINE_PATIENCE_S))
        before, self._unwanted = self._unwanted, {}
        for worker_id, worker in world.workers.items():
            self._look_at(worker, loop.time_of(worker_id), world.spec.config.kv_transfer.heartbeat_s)
            if worker.engine.has_work:
                self._look_for_nobody(worker_id, world, before)

    def _look_at(self, worker: SimulatedWorker, now_s: float, heartbeat_s: float) -> None:
        if worker.serving.done():
            self._all("workers live", invariants.life_faults(worker))
        if worker.sides.outbox.num_leases:
            self._all("reads", invariants.reading_faults(worker))
            patience_s = LEASE_PATIENCE_HEARTBEATS * heartbeat_s + self._late_s
            self._all("leases end", invariants.lease_faults(worker, now_s, patience_s))
        self._all("writes", invariants.writing_faults(worker))

    def _look_for_nobody(self, worker_id: str, world: World, before: dict[tuple[str, Key], float]) -> None:
        now_s = fault_loop().true_s
        patience_s = STRAY_S + (self._lasting_s + STRAY_AFTER_FAULTS_S if self._points.has_struck else 0.0)
        for key in invariants.work_for_nobody(world.workers[worker_id], world.dispatcher):
            since_s = self._unwanted[(worker_id, key)] = before.get((worker_id, key), now_s)
            if now_s - since_s > patience_s:
                self.found("no work for nobody", f"{worker_id} has worked on {key} for {now_s - since_s:.3f} s")

    def _all(self, invariant: str, faults: Iterable[str]) -> None:
        for fault in faults:
            self.found(invariant, fault)
