"""A worker: one engine, the prefill side and the decode side over it, and a gRPC server. Knows no Ray.

1. `start` plans the engine, starts it (a process of its own by default), binds a port, and says what it is;
2. calls come in by gRPC and go to the side they concern; one task reads the engine's outputs and gives them to both
   sides and to the token streams; one task sends heartbeats for what is being pulled and ends leases gone silent;
3. `failed` returns when the engine has died: this incarnation is then over, and its process should end.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator
from dataclasses import asdict, replace

from cluster.config import ClusterConfig
from cluster.rpc import control_pb2, convert
from cluster.rpc.auth import prefix_hash_key
from cluster.rpc.channels import Channels
from cluster.rpc.client import GrpcPeers
from cluster.rpc.server import WorkerServer
from cluster.spec import WorkerSpec
from decode_worker.intake import Intake
from engine.errors import StaleEpoch, WorkerLost
from engine.pool import BlockBytes, SharedPool
from engine.setup import EngineSetup, plan_engine
from engine.step_runner import ProcessStepRunner, StepRunner, ThreadStepRunner
from engine.streams import StreamBatch, TokenStreams
from engine.types import Endpoint, Key, StepOutputs, Submission
from kv_transfer.carriers.grpc import GrpcCarriers
from kv_transfer.lease import Offer
from prefill_worker.outbox import Outbox
from prefill_worker.queue import PrefillQueue
from prefill_worker.side import PrefillSide
from router.membership import Member

log = logging.getLogger(__name__)


class Worker:
    """Implements cluster.rpc.server.WorkerCalls, and what the actor shell needs."""

    def __init__(self, spec: WorkerSpec, config: ClusterConfig, secret: bytes) -> None:
        self._spec = spec
        self._config = config
        self._secret = secret
        self._role_epoch = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._failure: asyncio.Future[str] | None = None
        self._last_step_s = 0.0

    # --- life ----------------------------------------------------------------------------------------------

    async def start(self) -> Member:
        """Load the model and begin to serve. Raises ModelError or WorkerLost."""
        self._failure = asyncio.get_running_loop().create_future()
        key = prefix_hash_key(self._secret)
        setup = await asyncio.to_thread(plan_engine, self._config.model, self._config.engine, key)
        self._runner, self._pool = await self._start_engine(setup)
        self._channels = Channels(self._secret)
        self._bind(setup, self._block_bytes)
        await self._server.start()
        self._tasks = [asyncio.create_task(self._read_outputs()), asyncio.create_task(self._tick())]
        me = self._me
        return Member(me.worker_id, me.incarnation, self._spec.role, self._role_epoch, me.address, me.cohort)

    async def failed(self) -> str:
        assert self._failure is not None, "start comes first"
        return await asyncio.shield(self._failure)

    async def stop(self) -> None:
        """End streams, engine and server; idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._tasks:
            self._tasks = []
            await self._server.stop()
            await self._channels.close()
            await self._runner.stop()
            if self._pool is not None:
                self._pool.close()

    async def status(self) -> dict[str, object]:
        """For operators: load, leases and transfers."""
        message = self.status_message()
        return {"worker_id": self._me.worker_id, "role": message.role, **asdict(self._stats)}

    # --- calls (WorkerCalls) -------------------------------------------------------------------------------

    def submit(self, submission: Submission, role_epoch: int) -> None:
        if role_epoch < self._role_epoch:
            raise StaleEpoch(f"role epoch {role_epoch} is older than {self._role_epoch}")
        self._prefill.submit(submission)

    async def abort(self, key: Key) -> None:
        self._prefill.abort(key)
        await self._intake.abort(key)

    async def take_offer(self, offer: Offer) -> None:
        await self._intake.reserve(offer)

    def subscribe(self, gateway_id: str) -> AsyncGenerator[StreamBatch]:
        return self._streams.subscribe(gateway_id)

    def status_message(self) -> control_pb2.WorkerStatus:
        totals = self._intake.totals
        return control_pb2.WorkerStatus(
            endpoint=convert.endpoint_to(self._me), role=self._spec.role, role_epoch=self._role_epoch,
            stats=convert.stats_to(self._stats), num_queued=self._prefill.num_queued,
            num_leases=self._outbox.num_leases, num_pulls=self._intake.num_pulls, num_streams=self._streams.num_keys,
            transfers=totals.num_pulls, transfers_failed=totals.num_failed, transfer_bytes=totals.size_bytes,
            transfer_seconds=totals.duration_s, last_step_seconds=self._last_step_s,
        )  # fmt: skip

    # --- parts ---------------------------------------------------------------------------------------------

    async def _start_engine(self, setup: EngineSetup) -> tuple[StepRunner, SharedPool | None]:
        if self._config.engine.runner == "process":
            pool = SharedPool(setup.layout, setup.spec.num_blocks)
            runner = await ProcessStepRunner.start(setup, pool, self._config.cluster.start_timeout_s)
            self._block_bytes: BlockBytes = pool
            return runner, pool
        from engine.build import build_engine  # torch is only needed here

        pool = SharedPool(setup.layout, setup.spec.num_blocks) if setup.config.device == "cpu" else None
        built = await asyncio.to_thread(build_engine, setup, pool)
        self._block_bytes = pool or built.cache
        return ThreadStepRunner(built.engine, built.runner), None  # the tensors keep the memory

    def _bind(self, setup: EngineSetup, pool: BlockBytes) -> None:
        """Make the sides and the server; the port that the system chose becomes part of who we are."""
        config = self._config
        transfer = config.kv_transfer
        self._streams = TokenStreams(config.decode.orphan_s, self._abort_soon)
        self._outbox = Outbox(
            setup.layout, pool, transfer.frame_bytes, transfer.lease_ttl_s, lambda: secrets.token_hex(16), self._lease_ended
        )
        self._server = WorkerServer(self, self._outbox, self._secret, self._spec.incarnation)
        address = self._server.bind(self._spec.host)
        self._me = Endpoint(self._spec.worker_id, self._spec.incarnation, address, setup.cohort)
        queue = PrefillQueue(config.prefill.max_queue, config.prefill.outbox_fraction)
        send = self._runner.send
        self._prefill = PrefillSide(self._me, queue, self._outbox, self._streams, GrpcPeers(self._channels), send)
        self._intake = Intake(
            self._me, setup.layout, pool, GrpcCarriers(self._channels), self._streams, send, config.decode, transfer
        )
        self._stats = StepOutputs(stats=replace(StepOutputs().stats, num_blocks=setup.spec.num_blocks)).stats

    def _lease_ended(self, key: Key) -> None:
        self._prefill.on_lease_end(key)

    def _abort_soon(self, key: Key) -> None:
        """Its gateway has been gone for too long."""
        log.warning("%s has no reader any more and is aborted", key)
        self._tasks.append(asyncio.get_running_loop().create_task(self.abort(key)))

    async def _read_outputs(self) -> None:
        """Give each turn's outputs to both sides, then to the gateways."""
        try:
            while True:
                self._distribute(await self._runner.outputs())
        except WorkerLost as error:
            assert self._failure is not None
            if not self._failure.done():
                self._failure.set_result(error.message)

    def _distribute(self, outputs: StepOutputs) -> None:
        self._stats = outputs.stats
        self._last_step_s = outputs.step_s or self._last_step_s
        tokens = self._intake.on_outputs(replace(outputs, tokens=self._prefill.on_outputs(outputs)))
        self._streams.publish(tokens, outputs.stats)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._config.kv_transfer.heartbeat_s)
            self._outbox.expire()
            self._tasks = [task for task in self._tasks if not task.done()]
            await self._intake.beat()
