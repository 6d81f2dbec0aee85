"""The shared-memory carrier: on one host the consumer copies straight out of the producer's pool.

What is complete, where it lies, and its digests come over gRPC, as places; the bytes never do. A copy is checked where
it has arrived, so a block that was given to somebody else meanwhile is found out like any other wrong one.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

import grpc
import numpy as np
import xxhash

from engine.errors import FrameCorrupt
from engine.pool import PIECE_BYTES, SharedPool
from engine.rank_pools import RankPools
from engine.runs import Runs
from kv_transfer.carriers.door import OpenPool
from kv_transfer.carriers.grpc import GrpcCarrier
from kv_transfer.frames import Message, Place, PlacedFrame
from kv_transfer.lease import Lease


class ShmCarrier(GrpcCarrier):
    """The consumer's end, over the producer's pool as it is mapped here."""

    name = "shm"

    def __init__(self, channel: grpc.aio.Channel, source: SharedPool | RankPools) -> None:
        super().__init__(channel)
        self._source = source

    async def pull(self, lease: Lease, first_frame: int, present: Runs = ()) -> AsyncGenerator[Message]:
        async with aclosing(self.places(lease, first_frame, present)) as places:
            async for message in places:
                yield PlacedFrame(message, self._source) if isinstance(message, Place) else message


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
