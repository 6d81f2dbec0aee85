"""The KV pool as bytes: anonymous shared memory that the engine's process and the worker's process both map.

The engine sees tensors over it (engine/kv_cache.py); transfer sees block records through BlockBytes. It has no
name in any file system, so nothing is left behind when its processes end, however they end.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence as BlockIds
from typing import Protocol

import numpy as np

from engine.planes import CacheLayout, Plane


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

    def __init__(self, layout: CacheLayout, num_blocks: int, fd: int | None = None) -> None:
        """Map the pool behind `fd`, or make a new one."""
        self.layout = layout
        self.num_blocks = num_blocks
        self.size_bytes = layout.bytes_per_block * num_blocks
        self.fd = os.memfd_create("steelyard-kv") if fd is None else fd
        if fd is None:
            os.ftruncate(self.fd, self.size_bytes)
        self.memory = mmap.mmap(self.fd, self.size_bytes)
        self._planes = [self._plane_records(index) for index in range(len(layout.planes))]

    def read(self, plane: int, layers: range, block_ids: BlockIds[int]) -> bytes:
        records = self._planes[plane][layers.start : layers.stop]
        return records[:, list(block_ids)].tobytes()

    def write(self, plane: int, layers: range, block_ids: BlockIds[int], payload: memoryview) -> None:
        check_length(self.layout.planes[plane], layers, block_ids, payload)
        records = self._planes[plane][layers.start : layers.stop]
        records[:, list(block_ids)] = np.frombuffer(payload, np.uint8).reshape(len(layers), len(block_ids), -1)

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
