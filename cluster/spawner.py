"""The seam between the supervisor and whatever makes processes: Ray actors (ray_spawner.py), or a test's objects."""

from __future__ import annotations

from typing import Protocol

from cluster.config import PoolConfig
from cluster.spec import WorkerSpec
from engine.types import Role
from router.api import ControlView
from router.membership import Member, Membership
from router.policies.snapshot import Name
from router.report import GatewayReport


class Process(Protocol):
    """One incarnation of a worker or of a gateway, somewhere else."""

    @property
    def incarnation(self) -> str: ...

    async def failed(self) -> str:
        """Return why the incarnation is over, once it is."""
        ...

    async def stop(self, polite_s: float) -> None:
        """End it: politely, and by force when that took `polite_s`. Ending it twice is no error."""
        ...


class WorkerProcess(Process, Protocol):
    async def start(self) -> Member:
        """Raises SteelyardError when the worker could not start."""
        ...

    async def relabel(self, role: Role, role_epoch: int) -> None:
        """Raises SteelyardError."""
        ...

    async def member(self) -> Member:
        """What it is now, by its own word."""
        ...

    async def num_open(self) -> int:
        """Prompts, streams, leases and pulls that it has now."""
        ...


class GatewayProcess(Process, Protocol):
    async def start(self) -> str:
        """Return the base URL. Raises SteelyardError when the gateway could not start."""
        ...

    async def version(self) -> int:
        """The membership version that it holds, 0 for none."""
        ...

    async def apply(self, membership: Membership) -> None: ...

    async def report(self, control: ControlView) -> GatewayReport: ...

    async def evacuate(self, worker: Name, limit_s: float) -> int:
        """Move what generates on a worker elsewhere; how many are still placed there after about this time."""
        ...

    async def ready(self) -> None:
        """Return when a canary went through prefill, wire and decode."""
        ...


class Spawner(Protocol):
    """Makes processes, or finds the living ones of the same name."""

    async def worker(self, spec: WorkerSpec, pool: PoolConfig) -> WorkerProcess: ...

    async def gateway(self, name: str, incarnation: str, port: int) -> GatewayProcess: ...

    async def living(self) -> list[str]:
        """Names of the workers that live or have a place on the machines, whoever made them."""
        ...

    async def release(self, worker_id: str) -> None:
        """Give back what a worker that has ended took of the machines."""
        ...

    async def close(self) -> None:
        """Kill and remove everything that carries the cluster's names."""
        ...
