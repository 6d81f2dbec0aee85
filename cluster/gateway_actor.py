"""The gateway as a Ray actor: a thin shell around cluster.gateway.Gateway.

It remembers the version of the last membership that it was given, so that a restarted supervisor can go above it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

from cluster.config import ClusterConfig
from cluster.garbage import collect_seldom
from cluster.incarnation import Incarnation, Part
from cluster.spec import load_part
from engine.types import ErrorInfo
from router.api import ControlView
from router.membership import Membership
from router.policies.snapshot import Name
from router.report import GatewayReport


class GatewayPart(Part[str], Protocol):
    """What the shell needs of cluster.gateway.Gateway; it starts with its base URL."""

    def apply(self, membership: Membership) -> None: ...

    def report(self, control: ControlView) -> GatewayReport: ...

    async def evacuate(self, worker: Name, limit_s: float) -> int: ...

    async def ready(self) -> None: ...


class GatewayActor:
    """`part` is the import path of the Gateway class (cluster.spec.Parts). Each life has another id."""

    def __init__(self, name: str, incarnation: str, config: ClusterConfig, secret: bytes, part: str) -> None:
        make = cast(Callable[[ClusterConfig, bytes, str], GatewayPart], load_part(part))
        self._name = incarnation
        self._gateway = make(config, secret, f"{name}-{incarnation}")
        self._incarnation = Incarnation(self._gateway)
        self._version = 0

    async def incarnation(self) -> str:
        return self._name

    async def start(self) -> str | ErrorInfo:
        started = await self._incarnation.start()
        collect_seldom()
        return started

    async def failed(self) -> str:
        return await self._incarnation.failed()

    async def version(self) -> int:
        return self._version

    async def apply(self, membership: Membership) -> None:
        """Versions only rise: one that comes late, from a supervisor that is gone, is dropped."""
        if membership.version > self._version:
            self._gateway.apply(membership)
            self._version = membership.version

    async def report(self, control: ControlView) -> GatewayReport:
        return self._gateway.report(control)

    async def evacuate(self, worker: Name, limit_s: float) -> int:
        return await self._gateway.evacuate(worker, limit_s)

    async def ready(self) -> None:
        await self._gateway.ready()

    async def stop(self) -> None:
        await self._incarnation.stop()
