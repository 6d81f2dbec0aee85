"""A worker: one engine, the prefill side and the decode side over it, and a gRPC server. Knows no Ray.

1. `start` plans the engine, starts it (a process of its own by default), binds a port, and says what it is;
2. calls come in by gRPC and go to the sides (cluster/sides.py), which also get the engine's outputs;
3. `failed` returns when the engine has died: this incarnation is then over, and its process should end.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from dataclasses import asdict

from cluster.config import ClusterConfig
from cluster.rpc.auth import call_token, prefix_hash_key
from cluster.rpc.channels import Channels
from cluster.rpc.client import GrpcPeers
from cluster.rpc.server import WorkerServer
from cluster.rpc.tls import load_tls
from cluster.sides import Cache, Links, WorkerSides
from cluster.spec import WorkerSpec
from engine.calibration import calibrate
from engine.errors import WorkerLost
from engine.pool import BlockBytes, SharedPool
from engine.rank_pools import RankPools, pools_of, worker_pool
from engine.ring import RingPool, new_ring
from engine.setup import EngineSetup, plan_engine
from engine.step_runner import ProcessStepRunner, StepRunner, ThreadStepRunner
from engine.types import Endpoint, Role
from kv_transfer.carriers.choice import ChosenCarriers
from kv_transfer.carriers.distributed.porters import Porters
from kv_transfer.carriers.distributed.records import PorterSetup
from kv_transfer.carriers.distributed.service import DistService
from kv_transfer.carriers.door import PoolDoor
from kv_transfer.carriers.sample import Sample
from router.membership import Member

log = logging.getLogger(__name__)


class Worker:
    """Implements what the actor shell needs."""

    def __init__(self, spec: WorkerSpec, config: ClusterConfig, secret: bytes) -> None:
        self._spec = spec
        self._config = config
        self._secret = secret
        self._serving: asyncio.Task[None] | None = None
        self._failure: asyncio.Future[str] | None = None
        self._door: PoolDoor | None = None
        self._porters: Porters | None = None

    # --- life ----------------------------------------------------------------------------------------------

    async def start(self) -> Member:
        """Load the model and begin to serve. Raises ConfigError, ModelError or WorkerLost."""
        self._failure = asyncio.get_running_loop().create_future()
        tls = await asyncio.to_thread(load_tls, self._config.rpc.tls)
        key = prefix_hash_key(self._secret)
        model, engine, num_ranks = self._config.model, self._config.engine, self._spec.num_ranks
        group_bytes = self._config.kv_transfer.layer_group_bytes
        setup = await asyncio.to_thread(plan_engine, model, engine, key, num_ranks, group_bytes)
        self._runner, self._pool = await self._start_engine(setup)
        self._channels = Channels(self._secret, tls)
        spec = self._spec
        token = call_token(self._secret)
        self._sample = Sample()
        if "dist" in self._config.kv_transfer.carriers:
            self._porters = Porters(self._porter_setup(setup), self._block_bytes, self._sample)
            self._porters.begin()
        self._carriers = ChosenCarriers(self._channels, setup.layout, token, self._config.kv_transfer, self._porters)
        self._server = WorkerServer(self._secret, spec.incarnation, tls)
        me = Endpoint(spec.worker_id, spec.incarnation, self._server.bind(spec.host), setup.cohort)
        self._sides = WorkerSides(
            me,
            spec.role,
            Cache(setup.layout, setup.spec.num_blocks, self._block_bytes, key),
            Links(GrpcPeers(self._channels), self._carriers),
            self._runner.send,
            self._config,
            new_secret=lambda: secrets.token_hex(16),
        )
        if isinstance(self._block_bytes, SharedPool | RankPools | RingPool):
            self._door = PoolDoor(self._block_bytes, self._sample.fd, token, spec.incarnation)
        dist = DistService(self._sides.outbox, self._porters) if self._porters is not None else None
        await self._server.start(self._sides, self._sides.outbox, self._sample, dist)
        self._serving = asyncio.create_task(self._serve())
        return self._sides.member

    async def failed(self) -> str:
        assert self._failure is not None, "start comes first"
        return await asyncio.shield(self._failure)

    async def stop(self) -> None:
        """End streams, engine and server; idempotent."""
        serving, self._serving = self._serving, None
        if serving is None:
            return
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await self._server.stop()
        if self._door is not None:
            await self._door.close()
        await self._carriers.close()
        await self._channels.close()
        if self._porters is not None:
            await self._porters.stop()
        self._sample.close()
        await self._runner.stop()
        if self._pool is not None:
            self._pool.close()
        if isinstance(self._block_bytes, RingPool):
            self._block_bytes.close()

    async def relabel(self, role: Role, role_epoch: int) -> None:
        """See WorkerSides.relabel."""
        self._sides.relabel(role, role_epoch)

    async def member(self) -> Member:
        """What it is now."""
        return self._sides.member

    async def num_open(self) -> int:
        """Prompts, streams, leases and pulls that it has now."""
        return self._sides.status().num_open

    async def status(self) -> dict[str, object]:
        """For operators: load, leases and transfers."""
        status = self._sides.status()
        return {"worker_id": status.endpoint.worker_id, "role": status.role, **asdict(status.stats)}

    # --- parts ---------------------------------------------------------------------------------------------

    async def _start_engine(self, setup: EngineSetup) -> tuple[StepRunner, SharedPool | RankPools | None]:
        if self._config.engine.runner == "process":
            pool = _new_pool(setup)
            runner = await ProcessStepRunner.start(setup, pool, self._config.cluster.start_timeout_s)
            self._block_bytes: BlockBytes = pool
            return runner, pool
        from engine.build import behind_ring, build_engine  # torch is only needed here

        pool = None if setup.config.has_ring else SharedPool(setup.layout, setup.spec.num_blocks)
        built = await asyncio.to_thread(build_engine, setup, pool)
        if pool is None:
            transfer = self._config.kv_transfer
            ring = new_ring(setup.layout, transfer.ring_bytes, transfer.frame_bytes)
            self._block_bytes = behind_ring(built.cache, ring, setup.config.device)
        else:
            self._block_bytes = pool
        budget_s = setup.config.calibrate_s
        calibration = await asyncio.to_thread(calibrate, setup.spec, built.steps, budget_s, time.perf_counter)
        return ThreadStepRunner(built.engine, built.steps, calibration), None  # the tensors keep the memory

    def _porter_setup(self, setup: EngineSetup) -> PorterSetup:
        """The worker's patience with its porter is shorter than a pull's with the worker."""
        pool, transfer = self._block_bytes, self._config.kv_transfer
        num_pools = len(pools_of(pool)) if isinstance(pool, SharedPool | RankPools) else 0
        frame_bytes = max(transfer.frame_bytes, *(plane.bytes_per_block for plane in setup.layout.planes))
        return PorterSetup(
            setup.layout, setup.spec.num_blocks, num_pools, self._spec.host, self._config.engine.device, frame_bytes,
            transfer.pull_timeout_s / 2,
        )  # fmt: skip

    async def _serve(self) -> None:
        """Whatever ends the sides ends this incarnation: a worker that only seems to live would be worse."""
        try:
            reason = await self._sides.serve(lambda: self._runner.outputs())
        except Exception as error:
            log.exception("worker %s failed", self._spec.worker_id)
            reason = repr(error)
        assert self._failure is not None
        if not self._failure.done():
            self._failure.set_result(reason)


def _new_pool(setup: EngineSetup) -> SharedPool | RankPools:
    num_blocks, size_bytes = setup.spec.num_blocks, setup.spec.num_blocks * setup.layout.bytes_per_block
    try:
        return worker_pool(setup.layout, num_blocks, setup.num_ranks)
    except OSError as error:
        raise WorkerLost(f"no shared memory of {size_bytes} bytes for the KV pool: {error.strerror}") from None
