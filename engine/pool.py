"""The KV pool as bytes: anonymous shared memory that the engine's process and the worker's process both map.

The engine sees tensors over it (engine/kv_cache.py); transfer sees block records through BlockBytes. It has no
name in any file system, so nothing is left behind when its processes end, however they end.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from collections.abc import Sequence as BlockIds
from typing import Protocol

import numpy as np

from engine.planes import CacheLayout, Plane

Buffer = bytes | memoryview  # in one run
PIECE_BYTES = 2**18  # at a time, so that who looks at a copied piece finds it in the processor's cache


class BlockBytes(Protocol):
    """Raw records of blocks: what a transfer reads at the source and writes at the target."""

    def read(self, plane: int, layers: range, block_ids: BlockIds[int]) -> bytes:
        """Records [layers, blocks] of one plane, contiguous."""
        ...

    def write(self, plane: int, layers: range, block_ids: BlockIds[int], payload: memoryview) -> None:
        """The inverse of read. Raises ValueError if the payload's length does not fit exactly."""
        ...


def check_length(plane: Plane, layers: range, block_ids: BlockIds[int], payload: memoryview) -> None:
    """Raises ValueError if the payload is not as long as these records."""
    wanted = len(layers) * len(block_ids) * plane.bytes_per_block
    if payload.nbytes != wanted:
        raise ValueError(
            f"a payload of {payload.nbytes} bytes does not fit records of {wanted} bytes in plane {plane.name}"
        )


class SharedPool:
    """Memory for `num_blocks` blocks of a layout. Pages are taken from the system when first written."""

    def __init__(
        self, layout: CacheLayout, num_blocks: int, fd: int | None = None, access: int = mmap.ACCESS_DEFAULT
    ) -> None:
        """Map the pool behind `fd`, or make a new one. With ACCESS_READ nothing can be written to it from here."""
        self.layout = layout
        self.num_blocks = num_blocks
        self.size_bytes = layout.bytes_per_block * num_blocks
        self.fd = os.memfd_create("steelyard-kv") if fd is None else fd
        if fd is None:
            os.ftruncate(self.fd, self.size_bytes)
        self.memory = mmap.mmap(self.fd, self.size_bytes, access=access)
        self._planes = [self._plane_records(index) for index in range(len(layout.planes))]

    def read(self, plane: int, layers: range, block_ids: BlockIds[int]) -> bytes:
        records = self._planes[plane][layers.start : layers.stop]
        return records[:, list(block_ids)].tobytes()

    def write(self, plane: int, layers: range, block_ids: BlockIds[int], payload: memoryview) -> None:
        check_length(self.layout.planes[plane], layers, block_ids, payload)
        records = self._planes[plane][layers.start : layers.stop]
        records[:, list(block_ids)] = np.frombuffer(payload, np.uint8).reshape(len(layers), len(block_ids), -1)

    def records(self, plane: int) -> np.ndarray:
        """[layers, blocks, bytes] of one plane, where they lie."""
        return self._planes[plane]

    def record_run(self, plane: int, layer: int, first: int, count: int) -> np.ndarray:
        """[count, bytes]: the records of neighbouring blocks in one layer, where they lie."""
        return self._planes[plane][layer, first : first + count]

    def close(self) -> None:
        """Give the memory back. Tensors over it must be gone."""
        self._planes.clear()
        self.memory.close()
        os.close(self.fd)

    def _plane_records(self, index: int) -> np.ndarray:
        """[layers, blocks, bytes] of one plane."""
        plane = self.layout.planes[index]
        shape = (plane.num_slots, self.num_blocks, plane.bytes_per_block)
        offset = self.layout.plane_offset(index, self.num_blocks)
        return np.frombuffer(self.memory, np.uint8, int(np.prod(shape)), offset).reshape(shape)


def records_in_place(pool: BlockBytes, plane: int, layers: range, block_ids: BlockIds[int]) -> Iterator[Buffer]:
    """What `read` returns, in pieces; of a SharedPool without copying any."""
    if not isinstance(pool, SharedPool):
        yield pool.read(plane, layers, block_ids)
        return
    runs = _runs(block_ids, block_ids)
    for layer in layers:
        for first, _, count in runs:
            yield pool.record_run(plane, layer, first, count).reshape(-1).data


def copy_records(
    source: SharedPool, target: BlockBytes, plane: int, layers: range, from_ids: BlockIds[int], to_ids: BlockIds[int]
) -> Iterator[Buffer]:
    """Copy records from pool to pool; yields each piece where it has arrived, in the order of `read`."""
    if not isinstance(target, SharedPool):
        payload = source.read(plane, layers, from_ids)
        target.write(plane, layers, to_ids, memoryview(payload))
        yield payload
        return
    num_records = max(1, PIECE_BYTES // source.layout.planes[plane].bytes_per_block)
    runs = _runs(from_ids, to_ids)
    for layer in layers:
        for first, to, count in runs:
            for start in range(0, count, num_records):
                size = min(num_records, count - start)
                arrived = target.record_run(plane, layer, to + start, size)
                arrived[:] = source.record_run(plane, layer, first + start, size)
                yield arrived.reshape(-1).data


def _runs(from_ids: BlockIds[int], to_ids: BlockIds[int]) -> list[tuple[int, int, int]]:
    """(first, first, how many) of the blocks that are neighbours on both sides."""
    pairs = np.array((from_ids, to_ids))
    breaks = np.flatnonzero((np.diff(pairs) != 1).any(axis=0)) + 1
    starts = [0, *breaks.tolist()] if pairs.size else []
    stops = [*starts[1:], len(from_ids)]
    return [(from_ids[start], to_ids[start], stop - start) for start, stop in zip(starts, stops, strict=False)]
