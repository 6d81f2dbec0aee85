"""The supervisor: keeps every worker and every gateway alive, and keeps the numbered membership.

A worker's slot, over and over, until the cluster stops:
1. The spawner makes a process with a new incarnation, or hands back the living one of that name (a restarted
   supervisor adopts what its predecessor left).
2. The process starts (it loads the model) and answers with its Member; the membership's next version lists it.
3. Its incarnation ends, for whatever reason: the next version no longer lists it, at once.
4. What is left of it is cleared away, and after a bounded backoff the slot begins again.
A gateway's slot is the same, except that every version of the membership is pushed to the gateway while it lives. All
gateways listen on one port: the first one finds it, the others come after.

The cluster is READY when a first canary came back through every gateway, and ends when it is told to, when the driver's
lease runs out (lifetime `job`), or when it did not become ready. This module knows no Ray: see
cluster/supervisor_actor.py.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Coroutine
from dataclasses import replace

from cluster.bounded import first_of, within
from cluster.config import ClusterConfig
from cluster.control.controller import Controller
from cluster.control.drain import drain
from cluster.controlling import control
from cluster.end_limits import KEEPERS_S, SWEEP_S, EndLimits, end_limits
from cluster.slot import Slot
from cluster.spawner import GatewayProcess, Process, Spawner
from cluster.spec import ClusterStatus, Phase, UnitState, WorkerSpec
from cluster.supervised_fleet import SupervisedFleet
from cluster.worker_slots import WorkerSlot, WorkerSlots
from engine.errors import ConfigError, DeadlineExceeded, ModelError, SteelyardError
from engine.types import ErrorInfo, Role
from router.membership import Membership

log = logging.getLogger(__name__)

MAX_FIRST_ATTEMPTS = 3  # starts of one process that may fail before a cluster that was never ready gives up
FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
STEADY_S = 60.0  # an incarnation that served this long clears the backoff
ABANDONED_S = 3.0  # a job cluster's driver is heard every second
SETTLE_S = 5.0  # how long an adopted gateway keeps its last membership while we look for its workers
DRAIN_SLACK_S = 10.0  # for the last answers of a worker that leaves
APPLY_S = 10.0  # a gateway that has not taken a membership by then is replaced


def backoff_s(num_failures: int) -> float:
    """How long to wait before the next incarnation: doubling, bounded."""
    return min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(num_failures - 1, 16))


class Supervisor:
    """`run` lives as long as the cluster. `loopback`: workers bind to 127.0.0.1 instead of their node's address."""

    def __init__(
        self,
        config: ClusterConfig,
        spawner: Spawner,
        *,
        loopback: bool = False,
        new_incarnation: Callable[[], str] = lambda: secrets.token_hex(8),
        limits: EndLimits | None = None,
    ) -> None:
        self._config = config
        self._limits = limits or end_limits(config.router)
        self._spawner = spawner
        self._host = "127.0.0.1" if loopback else ""
        self._new_incarnation = new_incarnation
        self._workers = WorkerSlots(config.pools)
        self._gateways = [Slot(f"gateway-{index}") for index in range(config.router.gateways)]
        self._port = config.router.port
        self._url = ""
        self._phase = Phase.STARTING
        self._failure: ErrorInfo | None = None
        self._membership = Membership()
        self._sequence = 0
        self._changed = asyncio.Event()  # replaced at every change: whoever waits holds the old one
        self._heard = asyncio.Event()
        self._heard_at = 0.0
        self._keepers: list[asyncio.Task[None]] = []
        self._stopping: asyncio.Task[None] | None = None
        self._stopped = asyncio.Event()
        self._fleet = SupervisedFleet(self._workers, self._gateways, self._list_members, self)
        self.controller: Controller | None = None

    async def run(self) -> None:
        """Keep the cluster until it has been stopped."""
        if self._phase == Phase.STARTING and not self._keepers:
            self._heard_at = asyncio.get_running_loop().time()
            await self._find_added()
        if self._phase == Phase.STARTING and not self._keepers:
            for slot in self._gateways:
                self._keep(self._keep_gateway(slot))
            for slot in self._workers:
                slot.keeper = self._keep(self._keep_worker(slot))
            self._keep(self._watch_start())
            if self._config.is_controlled:
                self._keep(self._control())
            if self._config.cluster.lifetime == "job":
                self._keep(self._watch_lease())
        await self._stopped.wait()

    async def follow(self, after: int, timeout_s: float) -> ClusterStatus:
        """The driver's heartbeat: renews its lease. Returns at a status newer than `after`, or after timeout_s."""
        self._heard.set()
        self._heard_at = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(timeout_s):
                while self._sequence <= after:
                    await self._changed.wait()
        except TimeoutError:
            pass
        return self.status()

    def status(self) -> ClusterStatus:
        return ClusterStatus(
            sequence=self._sequence,
            phase=self._phase,
            membership_version=self._membership.version,
            workers=tuple(slot.status() for slot in self._workers),
            gateways=tuple(slot.status() for slot in self._gateways),
            url=self._url,
            failure=self._failure,
        )

    def membership(self) -> Membership:
        return self._membership

    def is_abandoned(self) -> bool:
        """Whether it is ending, or its driver seems to be gone: then a new cluster may take its name."""
        silent_s = asyncio.get_running_loop().time() - self._heard_at
        is_ending = self._phase in (Phase.STOPPING, Phase.STOPPED)
        return is_ending or (self._config.cluster.lifetime == "job" and silent_s > ABANDONED_S)

    async def stop(self) -> None:
        """End everything, within `stop_limit_s`. Stopping twice waits for the same end."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        await asyncio.shield(self._stopping)

    @property
    def stop_limit_s(self) -> float:
        return self._limits.total_s

    # --- slots ----------------------------------------------------------------------------------------------------

    async def _keep_worker(self, slot: WorkerSlot) -> None:
        pool = slot.pool
        while not slot.leaves:
            try:
                async with asyncio.timeout(self._config.cluster.start_timeout_s):
                    spec = WorkerSpec(slot.name, self._new_incarnation(), slot.role, self._host, pool.tensor_parallel)
                    process = await self._spawner.worker(spec, pool)
                    self._begin(slot, process)
                    await process.start()
                    slot.member = await process.member()  # one that is adopted may have changed its pool
                self._begin_serving(slot)
                slot.is_new = False
                self._list_members()
                slot.reason = await process.failed()
            except Exception as error:  # the slot must survive whatever its process does
                self._note_failure(slot, error)
            await self._clear(slot)

    async def _keep_gateway(self, slot: Slot) -> None:
        while slot is not self._gateways[0] and not self._url:
            await self._changed.wait()
        while True:
            try:
                async with asyncio.timeout(self._config.cluster.start_timeout_s):
                    process = await self._spawner.gateway(slot.name, self._new_incarnation(), self._port)
                    self._begin(slot, process)
                    self._url = await process.start()
                    await self._settle(await process.version())
                self._port = int(self._url.rpartition(":")[2])  # a later incarnation listens where clients already know
                self._begin_serving(slot)
                self._list_members()
                slot.reason = await first_of(process.failed(), self._push(process), self._await_canary(slot, process))
            except Exception as error:  # the slot must survive whatever its process does
                self._note_failure(slot, error)
            await self._clear(slot)

    def _begin(self, slot: Slot, process: Process) -> None:
        slot.process, slot.num_starts = process, slot.num_starts + 1
        self._announce()

    def _begin_serving(self, slot: Slot) -> None:
        slot.state, slot.settled = UnitState.RUNNING, True
        slot.serving_since = asyncio.get_running_loop().time()
        self._announce()

    def _note_failure(self, slot: Slot, error: Exception) -> None:
        timed_out = f"did not start within {self._config.cluster.start_timeout_s:g} s"
        slot.reason = timed_out if isinstance(error, TimeoutError) else str(error) or type(error).__name__
        never_ready = self._phase == Phase.STARTING and slot.state == UnitState.STARTING
        hopeless = isinstance(error, ConfigError | ModelError) or slot.num_failures + 1 >= MAX_FIRST_ATTEMPTS
        if never_ready and hopeless:
            self._fail(error if isinstance(error, SteelyardError) else SteelyardError(f"{slot.name}: {slot.reason}"))

    async def _clear(self, slot: Slot) -> None:
        """Unlist an incarnation that ended, clear its remains away, and wait until the next may begin."""
        now, since = asyncio.get_running_loop().time(), slot.serving_since
        slot.num_failures = 1 if since is not None and now - since >= STEADY_S else slot.num_failures + 1
        slot.state, slot.settled, slot.member, slot.serving_since = UnitState.WAITING, True, None, None
        self._list_members()
        log.warning("%s ended, failure %d in a row: %s", slot.name, slot.num_failures, slot.reason)
        if slot.process is not None:
            await within(
                self._limits.worker_step_s, slot.process.stop(self._limits.worker_s)
            )  # a gateway, too: it failed
            slot.process = None
        await asyncio.sleep(backoff_s(slot.num_failures))
        slot.state = UnitState.STARTING
        self._announce()

    async def _control(self) -> None:
        """From when the cluster is ready."""
        while self._phase == Phase.STARTING:
            await self._changed.wait()
        await control(self._fleet, self._config.controller_rules, self._note_controller)

    def _note_controller(self, controller: Controller) -> None:
        self.controller = controller

    # --- workers that come and leave ------------------------------------------------------------------------------

    def add_worker(self, role: Role) -> str:
        """Have one come that begins in this pool; its name."""
        slot = self._workers.add(role)
        slot.keeper = self._keep(self._keep_worker(slot))
        self._announce()
        return slot.name

    def remove_worker(self, worker_id: str, incarnation: str, limit_s: float) -> None:
        """See cluster.control.controller.Fleet.remove."""
        slot = next((slot for slot in self._workers if slot.name == worker_id and not slot.leaves), None)
        if slot is None or (slot.member.incarnation if slot.member is not None else "") != incarnation:
            return
        slot.leaves, slot.reason = True, ""
        self._keep(self._retire(slot, limit_s))
        self._announce()

    async def _retire(self, slot: WorkerSlot, limit_s: float) -> None:
        """What it has moves on or ends there; then it is gone, with all that it took of the machines."""
        if slot.member is not None:
            try:
                async with asyncio.timeout(limit_s + DRAIN_SLACK_S):
                    left = await drain(self._fleet, slot.member, limit_s)
                log.info("%s leaves with %d open tasks", slot.name, left)
            except Exception as error:  # it has ended by itself, or does not answer: it leaves all the same
                log.info("%s leaves: %s", slot.name, str(error) or type(error).__name__)
        if slot.keeper is not None:
            slot.keeper.cancel()
            await asyncio.wait([slot.keeper])
        slot.member = None
        self._list_members()
        if slot.process is not None:
            await within(self._limits.worker_step_s, slot.process.stop(self._limits.worker_s))
        await within(SWEEP_S, self._spawner.release(slot.name))
        self._workers.drop(slot)
        self._announce()

    async def _find_added(self) -> None:
        """Workers that an earlier supervisor of ours had come. Where some of the first had left, too, no more than may
        be there begin."""
        for _ in range(MAX_FIRST_ATTEMPTS):
            try:
                async with asyncio.timeout(SETTLE_S):
                    self._workers.find(await self._spawner.living(), self._config.controller_rules.scale.max_workers)
                return
            except Exception as error:  # those that the pools say are there anyway
                log.warning("added workers, if there are any, were not found: %s", str(error) or type(error).__name__)

    # --- membership -----------------------------------------------------------------------------------------------

    def _list_members(self) -> None:
        """Bring the membership up to the slots; a change is a new version."""
        members = tuple(slot.member for slot in self._workers if slot.member is not None)
        num_gateways = max(1, sum(slot.state == UnitState.RUNNING for slot in self._gateways))
        listed = Membership(self._membership.version, members, num_gateways)
        if listed != self._membership:
            self._membership = replace(listed, version=listed.version + 1)
        self._announce()

    async def _settle(self, held: int) -> None:
        """An adopted gateway routes by version `held`: go above it, once its workers had time to be found again."""
        if held == 0:
            return
        try:
            async with asyncio.timeout(SETTLE_S):
                while not all(slot.settled for slot in self._workers):
                    await self._changed.wait()
        except TimeoutError:
            pass
        self._membership = replace(self._membership, version=max(self._membership.version, held) + 1)
        self._phase = Phase.READY  # it was, under our predecessor: from now on we mend and do not give up

    async def _push(self, process: GatewayProcess) -> str:
        pushed = -1
        while True:
            changed, membership = self._changed, self._membership
            if membership.version > pushed:
                async with asyncio.timeout(APPLY_S):
                    await process.apply(membership)
                pushed = membership.version
            else:
                await changed.wait()

    async def _await_canary(self, slot: Slot, process: GatewayProcess) -> str:
        await process.ready()
        slot.proved = True
        if self._phase == Phase.STARTING and all(each.proved for each in self._gateways):
            self._phase = Phase.READY
            self._announce()
        return await asyncio.get_running_loop().create_future()  # the gateway's end is another's to report

    # --- how it ends ----------------------------------------------------------------------------------------------

    async def _watch_start(self) -> None:
        limit_s = self._config.cluster.start_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                while self._phase == Phase.STARTING:
                    await self._changed.wait()
        except TimeoutError:
            self._fail(DeadlineExceeded(f"the cluster was not ready within {limit_s:g} s: {self._missing()}"))

    def _missing(self) -> str:
        slots = [*self._workers, *self._gateways]
        missing = [f"{slot.name} is {slot.state}{f' ({slot.reason})' if slot.reason else ''}" for slot in slots
                   if slot.state != UnitState.RUNNING]  # fmt: skip
        return ", ".join(missing) or "no canary came back"

    async def _watch_lease(self) -> None:
        lease_s = self._config.cluster.driver_lease_s
        try:
            while True:
                async with asyncio.timeout(lease_s):
                    await self._heard.wait()
                self._heard.clear()
        except TimeoutError:
            self._fail(DeadlineExceeded(f"the driver was not heard for {lease_s:g} s"))

    def _fail(self, error: SteelyardError) -> None:
        self._failure = self._failure or ErrorInfo(error.code, error.message)
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())

    async def _stop(self) -> None:
        self._phase = Phase.STOPPING
        self._announce()
        await self._end_keepers()
        limits = self._limits
        # gateways first, because their requests in progress need the workers until they end
        drains = [slot.process.stop(limits.gateway_s) for slot in self._gateways if slot.process]
        await asyncio.gather(*(within(limits.gateway_step_s, drain) for drain in drains))
        self._unlist_all()
        ends = [slot.process.stop(limits.worker_s) for slot in self._workers if slot.process]
        await asyncio.gather(*(within(limits.worker_step_s, end) for end in ends))
        await within(SWEEP_S, self._spawner.close())
        for slot in [*self._gateways, *self._workers]:
            slot.state, slot.process = UnitState.STOPPED, None
        self._phase = Phase.STOPPED
        self._announce()
        self._stopped.set()

    async def _end_keepers(self) -> None:
        for task in self._keepers:
            task.cancel()
        if self._keepers:
            await asyncio.wait(self._keepers, timeout=KEEPERS_S)

    def _unlist_all(self) -> None:
        for slot in self._workers:
            slot.member = None
        self._list_members()

    # --- small things ---------------------------------------------------------------------------------------------

    def _announce(self) -> None:
        self._sequence += 1
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _keep(self, life: Coroutine[None, None, None]) -> asyncio.Task[None]:
        self._keepers = [task for task in self._keepers if not task.done()]
        self._keepers.append(asyncio.create_task(life))
        return self._keepers[-1]
