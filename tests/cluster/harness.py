"""Workers and a gateway in one event loop, without Ray: real engines, real gRPC on loopback, real HTTP."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from cluster.config import ClusterConfig, load_config
from cluster.gateway import Gateway
from cluster.spec import WorkerSpec
from cluster.worker import Worker
from engine.types import Role
from router.dispatch import Dispatcher
from router.membership import Member, Membership

READY_TIMEOUT_S = 120.0


@dataclass
class LocalCluster:
    config: ClusterConfig
    secret: bytes
    gateway: Gateway
    url: str = ""
    workers: dict[str, Worker] = field(default_factory=dict)
    members: dict[str, Member] = field(default_factory=dict)
    version: int = 0

    @property
    def dispatcher(self) -> Dispatcher:
        return self.gateway._dispatcher

    async def start_worker(self, role: Role, index: int = 0) -> None:
        """Start (or replace) one worker and list it."""
        name = f"{role}-{index}"
        pools = {Role.PREFILL: self.config.pools.prefill, Role.DECODE: self.config.pools.decode}
        spec = WorkerSpec(name, secrets.token_hex(4), role, "127.0.0.1", pools[role].tensor_parallel)
        worker = Worker(spec, self.config, self.secret)
        self.members[name] = await worker.start()
        self.workers[name] = worker
        self.publish()

    async def connected(self) -> None:
        """Returns when the gateway has connected to all workers: without a pool of each kind there is no proof."""
        while not all(view.connected for view in self.dispatcher.health().workers):  # noqa: ASYNC110 (no event)
            await asyncio.sleep(0.02)

    def publish(self) -> None:
        self.version += 1
        self.gateway.apply(Membership(self.version, tuple(self.members.values())))

    async def stop(self) -> None:
        await self.gateway.stop()
        await asyncio.gather(*(worker.stop() for worker in self.workers.values()))


@asynccontextmanager
async def local_cluster(
    overrides: Mapping[str, object] | None = None, num_prefill: int = 1, num_decode: int = 1
) -> AsyncIterator[LocalCluster]:
    """A cluster of configs/local.yaml with these overrides, ready to serve on a port that the system chose."""
    config = load_config("configs/local.yaml", {"router.port": 0, "engine.calibrate_s": 0, **(overrides or {})})
    secret = secrets.token_bytes(32)
    cluster = LocalCluster(config, secret, Gateway(config, secret, "gateway-test"))
    cluster.url = await cluster.gateway.start()
    try:
        starts = [cluster.start_worker(Role.PREFILL, index) for index in range(num_prefill)]
        starts += [cluster.start_worker(Role.DECODE, index) for index in range(num_decode)]
        await asyncio.gather(*starts)
        async with asyncio.timeout(READY_TIMEOUT_S):
            await (cluster.gateway.ready() if num_prefill and num_decode else cluster.connected())
        yield cluster
    finally:
        await cluster.stop()
