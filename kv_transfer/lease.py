"""The lease: what a decode worker must show to pull a prefilled request's blocks, and how long it holds.

1. granted   the prefill side offers it to the chosen decode worker, with a secret of its own;
2. held      while its owner, the decode worker, sends heartbeats; the producer's blocks stay;
3. released  by the owner after adoption or refusal, or ended `ttl_s` after the last heartbeat. Either way once.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from engine.errors import TransferFailed
from engine.planes import cohort_difference
from engine.types import STANDARD, Key, Service


def check_cohort(worker_id: str, theirs: str, ours: str) -> None:
    """Raises TransferFailed if KV cannot move between us and this worker, and says in what they differ."""
    if theirs != ours:
        raise TransferFailed(f"{worker_id} is of another cohort: they differ in {cohort_difference(theirs, ours)}")


@dataclass(frozen=True, slots=True)
class Lease:
    """Names a hand-off on one life of one producer. The secret is known to producer and owner only."""

    key: Key
    worker_id: str
    incarnation: str
    address: str  # host:port of the producer
    cohort: str  # layout hash
    secret: str

    def matches(self, other: Lease) -> bool:
        """Is this the same lease? Compared without leaking how much of a secret was right."""
        same = (self.key, self.incarnation, self.cohort) == (other.key, other.incarnation, other.cohort)
        return hmac.compare_digest(self.secret.encode(), other.secret.encode()) and same


@dataclass(frozen=True, slots=True)
class Offer:
    """What prefill asks of decode: reserve for this request, then pull under the lease.

    `num_growth`: tokens it is expected to generate; `gateway_id`: to whom its tokens go; `siblings`: other answers to
    its prompt, that each will grow as much from the same blocks; `names`: prefix hashes of the full blocks, so that
    what the owner has of them need not move. `moving`: it is a sequence that stands still meanwhile, and goes on where
    was unless the answer is that it has been adopted. `service`: what was promised to it."""

    lease: Lease
    num_tokens: int
    num_growth: int
    gateway_id: str
    timeout_s: float
    siblings: tuple[Key, ...] = ()
    names: tuple[bytes, ...] = ()
    moving: bool = False
    service: Service = STANDARD

    @property
    def keys(self) -> tuple[Key, ...]:
        return (self.lease.key, *self.siblings)


@dataclass(frozen=True, slots=True)
class Loan:
    """Full blocks of a prefix, that another worker may copy into its cache under the lease. `names`: their prefix
    hashes, in order; which blocks these are in every group both ends know (engine/loans.py)."""

    lease: Lease
    names: tuple[bytes, ...]
