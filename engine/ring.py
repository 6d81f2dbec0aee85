"""The staging ring: slots of shared host memory through which a pool is read that nobody else can map.

A slot's life, at a producer:
1. taken, and filled with a frame's records, which a kernel gathers (kernels/triton/records.py);
2. told of to a reader on this host, which has the ring mapped and copies the slot; or copied here, for a network;
3. given back: the reader came back for more, or its lease ended. Who has slots is the outbox's business.
What comes from outside is written through a slot, too, and scattered from there. The ring never grows: who finds no
free slot waits. It is anonymous memory, so nothing is left behind.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from collections.abc import Sequence as BlockIds
from typing import Protocol

from engine.planes import CacheLayout

OWN_SLOT = 0  # for what is used at once, here: never lent


class StagingRing:
    """Memory of `num_slots` slots; a new one, or what is behind `fd`, to be read."""

    def __init__(self, slot_bytes: int, num_slots: int, fd: int | None = None) -> None:
        self.slot_bytes = slot_bytes
        self.num_slots = num_slots
        self.size_bytes = slot_bytes * num_slots
        self.fd = os.memfd_create("steelyard-kv-ring") if fd is None else fd
        if fd is None:
            os.ftruncate(self.fd, self.size_bytes)
        access = mmap.ACCESS_DEFAULT if fd is None else mmap.ACCESS_READ
        self.memory = mmap.mmap(self.fd, self.size_bytes, access=access)

    def slot(self, index: int, size_bytes: int) -> memoryview:
        """The first bytes of a slot, where they lie. Let go of it before `close`."""
        start = index * self.slot_bytes
        return memoryview(self.memory)[start : start + size_bytes]

    def close(self) -> None:
        self.memory.close()
        os.close(self.fd)


class UnmappedPool(Protocol):
    """A pool whose bytes only its owner reaches: on a device, or in private memory (engine/kv_cache.py)."""

    @property
    def layout(self) -> CacheLayout: ...

    def gather(self, plane: int, layers: range, block_ids: BlockIds[int], slot: memoryview) -> None:
        """Records [layers, blocks] of one plane into a slot of their length; returns when they are there."""
        ...

    def scatter(self, plane: int, layers: range, block_ids: BlockIds[int], slot: memoryview) -> None:
        """The inverse. Raises ValueError if the slot's length does not fit exactly."""
        ...


class RingPool:
    """Implements engine.pool.BlockBytes over a pool behind a ring."""

    def __init__(self, pool: UnmappedPool, ring: StagingRing, unpin: Callable[[], None] = lambda: None) -> None:
        """`unpin` is called before the ring's memory goes."""
        self._pool = pool
        self._unpin = unpin
        self.ring = ring

    def read(self, plane: int, layers: range, block_ids: BlockIds[int]) -> bytes:
        return bytes(self.stage(plane, layers, block_ids, OWN_SLOT))

    def write(self, plane: int, layers: range, block_ids: BlockIds[int], payload: memoryview) -> None:
        slot = self.ring.slot(OWN_SLOT, self._size_bytes(plane, layers, block_ids))
        slot[:] = payload.cast("B")
        self._pool.scatter(plane, layers, block_ids, slot)

    def stage(self, plane: int, layers: range, block_ids: BlockIds[int], slot: int) -> memoryview:
        """What `read` returns, in this slot of the ring."""
        staged = self.ring.slot(slot, self._size_bytes(plane, layers, block_ids))
        self._pool.gather(plane, layers, block_ids, staged)
        return staged

    def close(self) -> None:
        self._unpin()
        self.ring.close()

    def _size_bytes(self, plane: int, layers: range, block_ids: BlockIds[int]) -> int:
        size_bytes = len(layers) * len(block_ids) * self._pool.layout.planes[plane].bytes_per_block
        assert size_bytes <= self.ring.slot_bytes, "frames are cut to fit a slot"
        return size_bytes


def new_ring(layout: CacheLayout, size_bytes: int, frame_bytes: int) -> StagingRing:
    """A slot for each frame that has room, beside the owner's own; at least one."""
    slot_bytes = max(frame_bytes, *(plane.bytes_per_block for plane in layout.planes))
    return StagingRing(slot_bytes, max(2, size_bytes // slot_bytes))
