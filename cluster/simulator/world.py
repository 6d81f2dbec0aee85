"""A simulated cluster: real sides, schedulers and dispatcher over modelled engines and links.

1. `start` makes the workers of both pools, links a dispatcher to them and waits until it hears from all;
2. `generate` is what a client sees of one request, noted in the event log;
3. `add_worker`, `retire`, `kill`, `unlist` and `network` change the cluster under way;
4. `close` lets go of everything and raises what failed in a worker, if anything did.

All that is random comes from the spec's seed. Made and used inside of one virtual loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field

from cluster.config import ClusterConfig
from cluster.control.controller import Controller
from cluster.control.flip import Flipped
from cluster.control.planner import Flip
from cluster.sides import Cache, Links, WorkerSides
from cluster.simulator.chance import Chance, SeededNames
from cluster.simulator.clock import virtual_loop
from cluster.simulator.fleet import SimulatedFleet
from cluster.simulator.host import Host
from cluster.simulator.known_times import KnownTimes
from cluster.simulator.links import (
    SimulatedCarriers,
    SimulatedConnector,
    SimulatedPeers,
    StepsAhead,
    WorkerNetwork,
    WorkerPort,
    times_of,
)
from cluster.simulator.log import EventLog
from cluster.simulator.network import Network
from cluster.simulator.plain import PlainPool, PlainTokens
from cluster.simulator.pool import StatePool
from cluster.simulator.recomputation import CountedRunner, Recomputation
from cluster.simulator.results import Happening
from cluster.simulator.service_times.model import ServiceTimes
from cluster.simulator.spec import WorldSpec
from cluster.simulator.step_runner import Model, ModelledStepRunner
from cluster.simulator.steps import ModelledRunner
from engine.engine import Engine, EngineSpec, ModelRunner
from engine.errors import SteelyardError
from engine.planes import layout_hash
from engine.sequence import Sequence
from engine.types import Endpoint, Key, Request, Role, TokenOutput
from router.dispatch import Dispatcher
from router.membership import Member, Membership

GATEWAY = "gateway-0"
PATIENCE_MARGIN = 2  # latencies: a small message takes little more than one


@dataclass(slots=True, eq=False)
class SimulatedWorker:
    """One life of one worker."""

    sides: WorkerSides
    engine: Engine
    pool: StatePool | PlainPool
    runner: ModelledStepRunner
    port: WorkerPort
    serving: asyncio.Task[str] = field(repr=False)

    def is_quiet(self) -> bool:
        """Does it hold nothing for anybody? Looked up in the tables themselves."""
        status, engine = self.sides.status(), self.engine
        held = engine.blocks.num_blocks - engine.blocks.num_available
        return not (engine.has_work or engine.has_outputs or held or status.num_open)

    async def stop(self) -> None:
        """Raises what failed here."""
        self.serving.cancel()
        await self.runner.stop()
        await asyncio.gather(self.serving, return_exceptions=True)
        if not self.serving.cancelled():
            self.serving.result()


class World:
    def __init__(self, spec: WorldSpec, log: EventLog, network: WorkerNetwork | None = None) -> None:
        self._loop = virtual_loop()
        self.spec = spec
        self.log = log
        self.workers: dict[str, SimulatedWorker] = {}  # those that live, by worker id
        self.network: WorkerNetwork = network or Network(spec.links, log)
        self.happenings: list[Happening] = []
        self.recomputation = Recomputation()
        self._dead: list[SimulatedWorker] = []
        self._host = Host(spec.slowdown) if spec.slowdown else None
        self._chance = Chance(spec.seed)
        self._membership = Membership()
        self._num_lives: dict[str, int] = {}
        self._deadlines: dict[str, float] = {}  # of the live requests
        block_size = spec.config.engine.block_size
        self._layout = spec.layout
        self._bytes_scale = spec.kv_token_bytes * block_size / self._layout.bytes_per_block
        self._config = _with_scaled_frames(spec.config, spec.frame_bytes, self._bytes_scale)
        self._cohort = layout_hash(self._layout, "simulated", str(spec.seed))
        self.gateway_port = self.network.attach(GATEWAY, GATEWAY, "1", None)
        names = SeededNames(self._chance.fork("names"))
        connector = SimulatedConnector(self.network, self.gateway_port, self._port_and_steps)
        predictor = KnownTimes(lambda role: spec.believed or spec.role(role).steps, spec.links)
        self.dispatcher = Dispatcher(
            spec.config.router, GATEWAY, connector, names, self._retried, spec.naming, spec.config.engine_limits,
            predictor,
        )  # fmt: skip
        self._controlling: asyncio.Task[None] | None = None
        self._background: list[asyncio.Task[None]] = []

    # --- life ----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        pools = self.spec.config.pools
        for role, size in ((Role.PREFILL, pools.prefill.workers), (Role.DECODE, pools.decode.workers)):
            for index in range(size):
                self.add_worker(role, index)
        while not all(worker.connected for worker in self.dispatcher.health().workers):  # noqa: ASYNC110
            await asyncio.sleep(self.spec.links.latency_s)
        self.dispatcher.rebalancer.start()
        if self.spec.is_controlled:
            self.control(Controller(SimulatedFleet(self), self.spec.config.controller_rules, on_flipped=self.flipped))

    def control(self, controller: Controller) -> None:
        """From now on it decides who is in which pool."""
        self._controlling = self._loop.create_task(controller.run(), name="controller")

    def in_background(self, work: Coroutine[None, None, None]) -> None:
        """Until the world is closed, which raises what it raised."""
        self._background = [task for task in self._background if not task.done() or task.exception() is not None]
        self._background.append(self._loop.create_task(work))

    @property
    def now(self) -> float:
        return self._loop.time()

    @property
    def num_events(self) -> int:
        return self._loop.num_calls

    async def close(self) -> None:
        if self._controlling is not None:
            self._controlling.cancel()
            await asyncio.gather(self._controlling, return_exceptions=True)
            if not self._controlling.cancelled():
                self._controlling.result()
        for task in self._background:
            task.cancel()
        for found in await asyncio.gather(*self._background, return_exceptions=True):
            if isinstance(found, Exception):
                raise found
        await self.dispatcher.close()
        for worker in self.all_workers:
            await worker.stop()

    @property
    def all_workers(self) -> tuple[SimulatedWorker, ...]:
        """Every life that there was."""
        return (*self.workers.values(), *self._dead)

    # --- requests ------------------------------------------------------------------------------------------

    async def generate(self, request: Request, *siblings: Request) -> AsyncGenerator[TokenOutput]:
        """The dispatcher's stream; what came and how it ended is noted."""
        name, ids = request.request_id, [one.request_id for one in (request, *siblings)]
        self.log.add(GATEWAY, "request", id=name, prompt=len(request.prompt_ids))
        deadline = self._loop.time() + min(request.timeout_s, self.spec.config.router.deadline_s)
        self._deadlines |= dict.fromkeys(ids, deadline)
        try:
            async with aclosing(self.dispatcher.generate(request, *siblings)) as outputs:
                async for output in outputs:
                    self._log_tokens(output)
                    yield output
        except SteelyardError as error:
            self.log.add(GATEWAY, "error", id=name, code=error.code, message=error.message)
            raise
        finally:
            for one in ids:
                self._deadlines.pop(one, None)
                self.recomputation.forget(one)
            self.log.add(GATEWAY, "end", id=name)

    async def tokens_of(self, request: Request) -> tuple[int, ...]:
        """All tokens of a request. Raises what ended it early."""
        tokens: list[int] = []
        async with aclosing(self.generate(request)) as outputs:
            async for output in outputs:
                assert output.first_index == len(tokens), f"token {output.first_index} came where {len(tokens)} was due"
                tokens.extend(output.token_ids)
        return tuple(tokens)

    def _retried(self, key: Key, error: SteelyardError) -> None:
        self.log.add(GATEWAY, "retry", id=key.request_id, epoch=key.epoch, code=error.code)
        self.recomputation.retried(key, error.code)

    def _log_tokens(self, output: TokenOutput) -> None:
        key, now = output.key, self._loop.time()
        if self.log.detailed:
            for index, (token_id, at) in enumerate(zip(output.token_ids, times_of(output, now, 0.0), strict=True)):
                first = output.first_index + index
                self.log.add(GATEWAY, "token", at, id=key.request_id, epoch=key.epoch, index=first, token=token_id)
        if output.finish is not None:
            self.log.add(GATEWAY, "finish", id=key.request_id, epoch=key.epoch, finish=output.finish)

    # --- the cluster under way -----------------------------------------------------------------------------

    async def catch_up(self) -> None:
        """Wait for a moment at which no tokens are on their way, and let everybody know what they would know then
        without bursts; for who kills, unlists or leaves next."""
        while (quiet_from := self._last_step_ended() + PATIENCE_MARGIN * self.spec.links.latency_s) > self.now:  # noqa: ASYNC110 (a time is waited for)
            await asyncio.sleep(quiet_from - self.now)
        for worker in self.workers.values():
            worker.runner.catch_up()
        await self._loop.quiet()

    def _last_step_ended(self) -> float:
        return max((worker.runner.last_end for worker in self.workers.values()), default=0.0)

    def add_worker(self, role: Role, index: int = 0) -> SimulatedWorker:
        """A new worker, or a new life of one that is dead, at its old address; it is listed at once."""
        worker_id = f"{role}-{index}"
        assert worker_id not in self.workers, f"{worker_id} lives"
        life = self._num_lives[worker_id] = self._num_lives.get(worker_id, 0) + 1
        worker = self.workers[worker_id] = self._make_worker(worker_id, f"{worker_id}.{life}", role)
        self._note(worker_id, f"came as {role}")
        self._list(worker_id, listed=True)
        return worker

    def kill(self, worker_id: str) -> None:
        """Its process ends at once, in the middle of whatever it does. It stays listed."""
        worker = self.workers.pop(worker_id)
        self.log.add(worker_id, "killed")
        self._note(worker_id, "died")
        self.network.kill(worker.port)
        worker.runner.crash()
        self._dead.append(worker)

    def unlist(self, worker_id: str) -> None:
        """The membership goes on without it."""
        self._note(worker_id, "left")
        self._list(worker_id, listed=False)

    def retire(self, worker_id: str) -> None:
        """It ends, and the membership goes on without it."""
        self.unlist(worker_id)
        self.kill(worker_id)

    def relist(self, member: Member) -> None:
        """The membership goes on with this record of a worker."""
        if member.worker_id in self.workers:
            self._publish(member)

    def worker(self, worker_id: str) -> SimulatedWorker | None:
        """If it lives."""
        return self.workers.get(worker_id)

    def members(self) -> tuple[Member, ...]:
        return self._membership.members

    def flipped(self, _wished: Flip, done: Flipped) -> None:
        """A flip is over."""
        self._note(done.worker_id, f"became {done.role}" if not done.problem else f"stayed {done.role}")

    # --- parts ---------------------------------------------------------------------------------------------

    def _note(self, worker_id: str, what: str) -> None:
        self.happenings.append(Happening(asyncio.get_running_loop().time(), worker_id, what))

    def _list(self, worker_id: str, listed: bool) -> None:
        if listed:
            self._publish(self.workers[worker_id].sides.member)
        else:
            self._apply([member for member in self._membership.members if member.worker_id != worker_id])

    def _publish(self, member: Member) -> None:
        """In its place, or as the last one."""
        others = {one.worker_id: one for one in self._membership.members}
        self._apply(list((others | {member.worker_id: member}).values()))

    def _apply(self, members: list[Member]) -> None:
        self._membership = Membership(self._membership.version + 1, tuple(members))
        self.dispatcher.apply(self._membership)

    def _make_worker(self, worker_id: str, incarnation: str, role: Role) -> SimulatedWorker:
        spec, config = self.spec, self._config
        modelled = spec.role(role)
        engine = self._make_engine(worker_id, spec.engine_spec(modelled.num_blocks))
        steps = self._step_times(worker_id, modelled.steps)
        if spec.plain:
            pool: StatePool | PlainPool = PlainPool(config.engine.block_size)
            tokens = PlainTokens(spec.vocab_size)
            model = Model(self._counted(tokens), steps, tokens if spec.bursts else None, self._host)
        else:
            pool = StatePool(config.engine.block_size, modelled.num_blocks)
            model = Model(self._counted(ModelledRunner(spec.weights, pool)), steps, host=self._host)
        runner = ModelledStepRunner(worker_id, engine, model, self.log, self._patience)
        me = Endpoint(worker_id, incarnation, f"{worker_id}:1", self._cohort)
        port: WorkerPort = self.network.attach(me.address, worker_id, incarnation, None)
        links = Links(SimulatedPeers(self.network, port), SimulatedCarriers(self.network, port, self._bytes_scale))
        cache = Cache(self._layout, modelled.num_blocks, pool, engine.spec.hash_key)
        secrets = self._chance.fork(incarnation)
        sides = WorkerSides(me, role, cache, links, runner.send, config, new_secret=lambda: secrets.hex(16))
        port.served = sides
        serving = asyncio.get_running_loop().create_task(sides.serve(runner.outputs), name=f"sides of {incarnation}")
        return SimulatedWorker(sides, engine, pool, runner, port, serving)

    def _counted(self, runner: ModelRunner) -> CountedRunner:
        return CountedRunner(runner, self.recomputation)

    def _make_engine(self, _worker_id: str, spec: EngineSpec) -> Engine:
        return Engine(spec)

    def _step_times(self, _worker_id: str, times: ServiceTimes) -> ServiceTimes:
        return times

    def _port_and_steps(self, member: Member) -> tuple[WorkerPort, StepsAhead]:
        worker = self.workers[member.worker_id]
        assert worker.port.incarnation == member.incarnation
        return worker.port, worker.runner

    def _patience(self, sequence: Sequence) -> float:
        """Until when tokens of a sequence may be sent for its client to see them."""
        deadlines = [self._deadlines.get(one.request_id, 0.0) for one in sequence.answers]
        return min(deadlines) - PATIENCE_MARGIN * self.spec.links.latency_s


def _with_scaled_frames(config: ClusterConfig, frame_bytes: int | None, bytes_scale: float) -> ClusterConfig:
    """Frames are cut by modelled bytes, of which there are `bytes_scale` for each that really moves."""
    frame_bytes = max(1, round((frame_bytes or config.kv_transfer.frame_bytes) / bytes_scale))
    transfer = config.kv_transfer.model_copy(update={"frame_bytes": frame_bytes})
    return config.model_copy(update={"kv_transfer": transfer})
