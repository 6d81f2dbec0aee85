"""Records of a cluster's composition: what a worker is told, what the supervisor reports, which classes run.

Standard library only, so that the command line can import it at once.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from enum import StrEnum

from engine.types import ErrorInfo, Role

NAME_PREFIX = "steelyard-"  # of all actors in the cluster's namespace
SUPERVISOR_NAME = f"{NAME_PREFIX}supervisor"


def actor_name(unit: str) -> str:
    """Ray name of a worker's or a gateway's actor."""
    return f"{NAME_PREFIX}{unit}"


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One worker. `incarnation` names this life of it; a new process gets a new one."""

    worker_id: str  # "<pool>-<i>"
    incarnation: str
    role: Role
    host: str  # what its gRPC server binds to; "" lets the actor put in its node's address
    num_ranks: int = 1  # tensor-parallel


@dataclass(frozen=True, slots=True)
class Parts:
    """Import paths ("module:name") of what the actors and the launcher wrap; tests name fakes here."""

    worker: str = "cluster.worker:Worker"
    gateway: str = "cluster.gateway:Gateway"
    resolve: str = "engine.models.store:resolve"


def load_part(path: str) -> object:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


class UnitState(StrEnum):
    """Where one supervised process (a worker or a gateway) is in its life."""

    STARTING = "starting"
    RUNNING = "running"
    WAITING = "waiting"  # it ended; a new incarnation starts after the backoff
    LEAVING = "leaving"  # for good; it still serves what it has
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class UnitStatus:
    name: str
    state: UnitState
    incarnation: str
    num_restarts: int
    reason: str  # why the last incarnation ended, "" before that
    role: str = ""  # of a worker that is listed


class Phase(StrEnum):
    STARTING = "starting"
    READY = "ready"  # a first canary went through prefill, wire and decode
    STOPPING = "stopping"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """What the supervisor tells its driver. `sequence` rises with every change."""

    sequence: int
    phase: Phase
    membership_version: int
    workers: tuple[UnitStatus, ...]
    gateways: tuple[UnitStatus, ...]
    url: str  # of all gateways; "" until one listens
    failure: ErrorInfo | None  # why the cluster ended or never became ready
