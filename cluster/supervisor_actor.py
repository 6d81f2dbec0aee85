"""The supervisor as a Ray actor: named, detached, and restarted by Ray as often as it dies.

Its constructor starts its life by calling itself, because nobody calls a restarted actor. When the cluster has
stopped, it stays for a moment, so that its driver can hear why, and ends itself.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

import ray

from cluster.config import ClusterConfig
from cluster.ray_actors import Actor, kill
from cluster.ray_spawner import RaySpawner
from cluster.spec import ClusterStatus, Parts
from cluster.supervisor import Supervisor
from router.membership import Membership

LINGER_S = 2.0


class SupervisorActor:
    def __init__(self, config: ClusterConfig, secret: bytes, parts: Parts, loopback: bool) -> None:
        self._supervisor = Supervisor(config, RaySpawner(config, secret, parts), loopback=loopback)
        me = ray.get_runtime_context().current_actor
        self._me = cast(Actor, me)
        cast(Any, me).live.remote()

    async def live(self) -> None:
        await self._supervisor.run()
        await asyncio.sleep(LINGER_S)
        await asyncio.to_thread(kill, self._me)

    async def follow(self, after: int, timeout_s: float) -> ClusterStatus:
        return await self._supervisor.follow(after, timeout_s)

    async def membership(self) -> Membership:
        return self._supervisor.membership()

    async def is_abandoned(self) -> bool:
        return self._supervisor.is_abandoned()

    async def stop(self) -> ClusterStatus:
        await self._supervisor.stop()
        return self._supervisor.status()
