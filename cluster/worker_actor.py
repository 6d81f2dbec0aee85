"""A worker as a Ray actor: a thin shell around cluster.worker.Worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol, cast

import ray

from cluster.config import ClusterConfig
from cluster.incarnation import Incarnation, Part, told
from cluster.spec import WorkerSpec, load_part
from engine.types import ErrorInfo, Role
from router.membership import Member


class WorkerPart(Part[Member], Protocol):
    """What the shell needs of cluster.worker.Worker."""

    async def relabel(self, role: Role, role_epoch: int) -> None: ...

    async def member(self) -> Member: ...

    async def num_open(self) -> int: ...

    async def status(self) -> dict[str, object]: ...


class WorkerActor:
    """`part` is the import path of the Worker class (cluster.spec.Parts)."""

    def __init__(self, spec: WorkerSpec, config: ClusterConfig, secret: bytes, part: str) -> None:
        make = cast(Callable[[WorkerSpec, ClusterConfig, bytes], WorkerPart], load_part(part))
        self._spec = replace(spec, host=spec.host or ray.util.get_node_ip_address())
        self._worker = make(self._spec, config, secret)
        self._incarnation = Incarnation(self._worker)

    async def incarnation(self) -> str:
        return self._spec.incarnation

    async def start(self) -> Member | ErrorInfo:
        return await self._incarnation.start()

    async def failed(self) -> str:
        return await self._incarnation.failed()

    async def relabel(self, role: Role, role_epoch: int) -> ErrorInfo | None:
        return await told(self._worker.relabel(role, role_epoch))

    async def member(self) -> Member:
        return await self._worker.member()

    async def num_open(self) -> int:
        return await self._worker.num_open()

    async def status(self) -> dict[str, object]:
        return await self._worker.status()

    async def stop(self) -> None:
        await self._incarnation.stop()
