"""The supervisor as a Ray actor: named, detached, and restarted by Ray as often as it dies.

1. The constructor has its life begun by a call of itself, because nobody calls a restarted actor. Such a call can
   get lost while Ray still believes the actor to be restarting, so it is repeated until it has been answered.
2. When the cluster has stopped, it stays for a moment, so that its driver can hear why, and ends itself.
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any, cast

import ray
from ray.exceptions import RayError

from cluster.config import ClusterConfig
from cluster.ray_actors import Actor, kill
from cluster.ray_spawner import RaySpawner
from cluster.spec import ClusterStatus, Parts
from cluster.supervisor import Supervisor
from router.membership import Membership

LINGER_S = 2.0
RETRY_S = 0.2


class SupervisorActor:
    def __init__(self, config: ClusterConfig, secret: bytes, parts: Parts, loopback: bool) -> None:
        self._supervisor = Supervisor(config, RaySpawner(config, secret, parts), loopback=loopback)
        self._life: asyncio.Task[None] | None = None
        self._me = cast(Actor, ray.get_runtime_context().current_actor)
        threading.Thread(target=_begin, args=(self._me,), daemon=True).start()

    async def begin(self) -> None:
        if self._life is None:
            self._life = asyncio.create_task(self._live())

    async def follow(self, after: int, timeout_s: float) -> ClusterStatus:
        return await self._supervisor.follow(after, timeout_s)

    async def membership(self) -> Membership:
        return self._supervisor.membership()

    async def is_abandoned(self) -> bool:
        return self._supervisor.is_abandoned()

    async def stop_limit_s(self) -> float:
        return self._supervisor.stop_limit_s

    async def stop(self) -> ClusterStatus:
        await self._supervisor.stop()
        return self._supervisor.status()

    async def _live(self) -> None:
        await self._supervisor.run()
        await asyncio.sleep(LINGER_S)
        await asyncio.to_thread(kill, self._me)


def _begin(actor: Actor) -> None:
    while True:
        try:
            return ray.get(cast(Any, actor).begin.remote())
        except RayError:
            time.sleep(RETRY_S)
