"""The shared-memory carrier: on one host the consumer copies straight out of the producer's pool, or out of the ring
through which that pool is read.

What is complete, where it lies, and its digests come over gRPC, as places; the bytes never do. A copy is checked where
it has arrived, so a block that was given to somebody else meanwhile is found out like any other wrong one. From a ring
a frame is copied whole, and checked before it is written anywhere. Each call tells of as many as the ring has room for;
the next call says that they have been copied, and frees their slots.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

import grpc
import numpy as np
import xxhash

from engine.errors import FrameCorrupt, TransferFailed
from engine.pool import PIECE_BYTES, SharedPool
from engine.rank_pools import RankPools
from engine.ring import StagingRing
from engine.runs import Runs
from kv_transfer.carriers.door import OpenPool
from kv_transfer.carriers.grpc import GrpcCarrier
from kv_transfer.frames import Commit, Frame, Message, Place, PlacedFrame
from kv_transfer.lease import Lease


class ShmCarrier(GrpcCarrier):
    """The consumer's end, over the producer's pool or ring as it is mapped here."""

    name = "shm"

    def __init__(self, channel: grpc.aio.Channel, source: SharedPool | RankPools | StagingRing) -> None:
        super().__init__(channel)
        self._source = source

    async def pull(self, lease: Lease, first_frame: int, present: Runs = ()) -> AsyncGenerator[Message]:
        source = self._source
        if isinstance(source, StagingRing):
            async with aclosing(self._pull_staged(source, lease, first_frame, present)) as messages:
                async for message in messages:
                    yield message
            return
        async with aclosing(self.places(lease, first_frame, present)) as places:
            async for message in places:
                yield PlacedFrame(message, source) if isinstance(message, Place) else message

    async def _pull_staged(
        self, ring: StagingRing, lease: Lease, first_frame: int, present: Runs
    ) -> AsyncGenerator[Frame | Commit]:
        """Calls until the COMMIT. Whoever takes a frame has used it when it asks for the next."""
        while True:
            num_before = first_frame
            async with aclosing(self.places(lease, first_frame, present)) as places:
                async for message in places:
                    if isinstance(message, Commit):
                        yield message
                        return
                    yield _copied(ring, message)
                    first_frame += 1
            if first_frame == num_before:
                raise TransferFailed(f"{lease.worker_id} told of no frame")


def _copied(ring: StagingRing, place: Place) -> Frame:
    """Out of the ring, so that what is checked is what will be used. Raises FrameCorrupt if it lies nowhere there."""
    if place.staged is None or not place.staged.stop <= ring.size_bytes or len(place.staged) > ring.slot_bytes:
        raise FrameCorrupt(f"frame {place.index} lies in no slot of its producer's ring")
    return Frame(place.index, place.spec, ring.memory[place.staged.start : place.staged.stop], place.digest)


def copy_rate(opened: OpenPool, digest: int) -> float:
    """Bytes per second at which the sample is copied and checked. Raises FrameCorrupt if it is not what its owner
    says."""
    source = np.frombuffer(opened.sample, np.uint8)
    target, found = np.ones_like(source), xxhash.xxh3_64()
    begun = time.perf_counter()
    for start in range(0, len(source), PIECE_BYTES):
        piece = target[start : start + PIECE_BYTES]
        piece[:] = source[start : start + PIECE_BYTES]
        found.update(piece.data)
    rate = len(source) / (time.perf_counter() - begun)
    if found.intdigest() != digest:
        raise FrameCorrupt("the sample in the producer's memory does not match its digest")
    return rate
