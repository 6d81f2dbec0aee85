"""One fault run: a scenario under a plan, watched from the first event to the last.

1. the clients come, faults strike at their points;
2. when the last client has ended no more fault begins, and those under way end: cuts are mended, the dead come back;
3. after SETTLE_S the cluster must be whole again: it serves a probe through every phase, and then holds nothing;
4. it is let go of, and no task is left.

The same case gives the same log, byte for byte.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from cluster.simulator.clock import Deadlock, LostErrors, TimeLimit, run_on
from cluster.simulator.faults import invariants
from cluster.simulator.faults.case import Case
from cluster.simulator.faults.clients import FINISHED, Client
from cluster.simulator.faults.invariants import Violation
from cluster.simulator.faults.loop import FaultLoop, within
from cluster.simulator.faults.plan import LASTING, Fault, FaultKind, lasting_s
from cluster.simulator.faults.points import Census, Points
from cluster.simulator.faults.scenario import AMPLE_S, Asked
from cluster.simulator.faults.watch import Violated, Watch
from cluster.simulator.faults.world import FaultyWorld
from cluster.simulator.log import EventLog
from cluster.simulator.world import GATEWAY

SETTLE_S = 10.0  # a silence is noticed (5 s), a link is made again (2 s); and after them a lease ends
MOST_SURVIVED = 1  # faults that cost nobody an answer: a long cut fails two placements, and a third one would count
QUIET_S = 3.0  # longer than an intake waits before it tells of a lost lease
PROBE = Asked("probe", 0.0, family=0, num_shared=3, num_own=9, max_tokens=4, timeout_s=5.0)
LIMIT_S = 10 * AMPLE_S


@dataclass(frozen=True, slots=True)
class Outcome:
    """`violation`: the first one, or None. `ends`: how each client fared. `digest`: of the event log."""

    violation: Violation | None
    ends: tuple[tuple[str, str | None], ...]
    census: Census
    digest: str


def run_case(case: Case, log: EventLog | None = None) -> Outcome:
    return _Run(case, log or EventLog(keep=False)).outcome()


class _Run:
    def __init__(self, case: Case, log: EventLog) -> None:
        self._case = case
        self._log = log
        self._points = Points(case.plan, self._strike)
        self._watch = Watch(case.plan, self._points)
        self._spec = case.scenario.world_spec()
        self._clients = {asked.name: self._client(asked) for asked in case.scenario.requests}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._world: FaultyWorld | None = None

    def outcome(self) -> Outcome:
        loop = FaultLoop(LIMIT_S, self._points)
        loop.on_quiet = self._watch.on_quiet
        violation = None
        try:
            run_on(loop, self._play(loop))
        except Violated as violated:
            violation = violated.violation
        except (Deadlock, TimeLimit) as stuck:
            violation = Violation("nothing hangs", str(stuck), loop.true_s)
        except LostErrors as lost:
            violation = Violation("no error is lost", f"{lost}: {lost.__cause__!r}", loop.true_s)
        ends = tuple((name, client.ended) for name, client in self._clients.items())
        return Outcome(violation, ends, self._points.census(), self._log.digest())

    async def _play(self, loop: FaultLoop) -> None:
        world = self._world = FaultyWorld(self._spec, self._log, self._points, self._cancel, self._watch.on_turn)
        self._watch.world = world
        await world.start()
        begun_s = loop.time()
        for client in self._clients.values():
            await asyncio.sleep(max(0.0, begun_s + client.asked.at_s - loop.time()))
            self._begin(loop, client, world)
        if self._tasks:
            await asyncio.wait(self._tasks.values())
        self._points.stop()
        await asyncio.sleep(lasting_s(self._case.plan, *LASTING) + SETTLE_S + self._case.scenario.lease_ttl_s)
        self._check_service()
        await self._probe(loop, world)
        await self._end(loop, world)

    def _client(self, asked: Asked) -> Client:
        return Client(asked, self._case.scenario.requests_of(asked), self._spec.weights, self._watch)

    def _begin(self, loop: FaultLoop, client: Client, world: FaultyWorld) -> asyncio.Task[None]:
        with within(GATEWAY):
            task = loop.create_task(client.run(world), name=client.asked.name)
        self._tasks[client.asked.name] = task
        return task

    def _strike(self, fault: Fault) -> None:
        if self._world is not None:
            self._world.strike(fault)

    def _cancel(self, answer: str, by_gateway: bool) -> None:
        name = answer.partition(".")[0]
        if name not in self._tasks or self._world is None:  # it has not come yet, or never does in a smaller case
            return
        if by_gateway:
            self._clients[name].cancel(self._world, answer)
        else:
            self._tasks[name].cancel()

    # --- what must be in the end ---------------------------------------------------------------------------

    def _check_service(self) -> None:
        """Whoever had time enough was served, where little went wrong."""
        for name, task in self._tasks.items():
            if not task.cancelled() and (error := task.exception()) is not None:
                self._watch.found("honest errors", f"{name} got {error!r}")
        if len(self._case.plan) > MOST_SURVIVED:
            return
        left = [fault.target.partition(".")[0] for fault in self._case.plan if fault.kind is FaultKind.CANCEL]
        for name, client in self._clients.items():
            if client.ended != FINISHED and client.asked.is_patient and name not in left:
                self._watch.found("all are served", f"{name} got {client.ended} from {len(self._case.plan)} faults")

    async def _probe(self, loop: FaultLoop, world: FaultyWorld) -> None:
        """The cluster is whole again."""
        probe = self._client(PROBE)
        await asyncio.wait([self._begin(loop, probe, world)])
        if probe.ended != FINISHED:
            self._watch.found("all are served", f"long after the last fault a request got {probe.ended}")

    async def _end(self, loop: FaultLoop, world: FaultyWorld) -> None:
        await asyncio.sleep(QUIET_S)
        for worker in world.workers.values():
            for fault in invariants.leftovers(worker):
                self._watch.found("nothing is left", fault)
        for fault in invariants.gateway_leftovers(world.dispatcher):
            self._watch.found("nothing is left", fault)
        self._watch.world = None  # what ends now was told to
        for client in self._clients.values():
            client.let_go()
        await world.close()
        await asyncio.sleep(1.0)
        if tasks := [task.get_name() for task in loop.pending() if task is not asyncio.current_task()]:
            self._watch.found("nothing is left", f"the tasks {', '.join(tasks)} go on after the end")
        await asyncio.sleep(0.001)  # so that what was found last is told
