"""The seams of a transfer: what a consumer asks of a producer, over whatever carries it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Protocol

from engine.errors import LeaseLost, SteelyardError, TransferFailed
from engine.runs import Runs
from engine.types import KvPath
from kv_transfer.frames import Commit, Frame, Message, Place
from kv_transfer.lease import Lease

RELEASE_TIMEOUT_S = 2.0


class Producer(Protocol):
    """The prefill side as the carrier's server sees it (prefill_worker/outbox.py)."""

    def messages(self, lease: Lease, first_frame: int, present: Runs = ()) -> AsyncGenerator[Frame | Commit]:
        """Frames from `first_frame` on as they are computed, then the COMMIT. Blocks in `present` are in no frame; a
        lease's first pull fixes which these are. Raises LeaseLost, InvalidRequest."""
        ...

    def places(self, lease: Lease, first_frame: int, present: Runs = ()) -> AsyncGenerator[tuple[Place, ...] | Commit]:
        """The same for a reader of the pool itself: where the frames lie, and their digests."""
        ...

    def release(self, lease: Lease) -> None:
        """The owner needs the blocks no more. Releasing twice is no error."""
        ...

    def renew(self, leases: Sequence[Lease]) -> None:
        """Heartbeat: the owner still wants these."""
        ...


class Carrier(Protocol):
    """The consumer's end of a link to one producer (decode side). `name`: the kind, as metrics tell it."""

    @property
    def name(self) -> str: ...

    def pull(self, lease: Lease, first_frame: int, present: Runs = ()) -> AsyncGenerator[Message]:
        """The producer's `messages`. A broken link raises TransferFailed."""
        ...

    async def release(self, lease: Lease) -> None: ...

    async def renew(self, leases: Sequence[Lease]) -> None: ...


class CarrierPool(Protocol):
    """Opens and reuses carriers by producer address."""

    @property
    def num_fallbacks(self) -> Mapping[str, int]:
        """From each carrier to another, in this worker's life."""
        ...

    def carrier(self, lease: Lease) -> Carrier: ...

    def paths(self) -> tuple[KvPath, ...]:
        """How fast they were measured to be."""
        ...


async def release(carriers: CarrierPool, lease: Lease) -> None:
    """Tell the producer that the blocks are needed no more; if it cannot be told, the lease ends by itself."""
    try:
        async with asyncio.timeout(RELEASE_TIMEOUT_S):
            await carriers.carrier(lease).release(lease)
    except (SteelyardError, TimeoutError):
        return


def as_transfer_error(error: SteelyardError) -> TransferFailed:
    """What an error of the link or of the producer means for a transfer."""
    if isinstance(error, TransferFailed):
        return error
    if error.status == 409:  # the producer's life that granted the lease is over
        return LeaseLost(error.message)
    return TransferFailed(error.message)
