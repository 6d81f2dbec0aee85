"""The numbered list of workers that everyone routes by; whoever holds one keeps it until a higher number comes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from engine.planes import cohort_difference
from engine.types import Endpoint, Role


class Pool(NamedTuple):
    """Workers that are alike: of one cohort and one role."""

    cohort: str
    role: Role


@dataclass(frozen=True, slots=True)
class Member:
    """One worker that may be routed to. `incarnation` names this life of it; a new process is a new one.

    Workers of unequal `cohort` (the layout hash) are never paired. `role_epoch` rises with every flip. One that
    `is_leaving` its pool gets no new requests; what it has goes on.
    """

    worker_id: str
    incarnation: str
    role: Role
    role_epoch: int
    address: str  # host:port of its gRPC server
    cohort: str
    kv_token_bytes: int = 0  # KV of one token, over all layers
    is_leaving: bool = False
    name: tuple[str, str] = field(init=False, repr=False, compare=False)  # this life: its id and its incarnation
    pool: Pool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """What is asked for hundreds of times in a decision is made once."""
        object.__setattr__(self, "name", (self.worker_id, self.incarnation))
        object.__setattr__(self, "pool", Pool(self.cohort, self.role))

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.worker_id, self.incarnation, self.address, self.cohort)


@dataclass(frozen=True, slots=True)
class Membership:
    """All workers at one version, and how many gateways there are. Versions only rise."""

    version: int = 0
    members: tuple[Member, ...] = ()
    num_gateways: int = 1  # that are live: each has an equal share of every tenant's quota

    def by_role(self, role: Role) -> tuple[Member, ...]:
        return tuple(member for member in self.members if member.role == role)

    def unpaired(self) -> list[str]:
        """Of each prefill and decode worker that will not work together: who they are, and why."""
        return [
            f"{first.worker_id} and {second.worker_id} are never paired: they differ in "
            f"{cohort_difference(first.cohort, second.cohort)}"
            for first in self.by_role(Role.PREFILL)
            for second in self.by_role(Role.DECODE)
            if first.cohort != second.cohort
        ]
