"""The KV pool as tensors: one per plane, [num_layers, num_blocks, *block_shape]."""

from __future__ import annotations

from collections.abc import Sequence as BlockIds

import numpy as np
import torch

from engine.planes import CacheLayout
from engine.pool import SharedPool, check_length
from kernels.dispatch import record_copies
from kernels.reference.layers import copy_blocks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class KVCache:
    """Tensors over a SharedPool (CPU) or of their own, on any device (where `pool` is None). Implements
    engine.ring.UnmappedPool, for those."""

    def __init__(self, layout: CacheLayout, num_blocks: int, device: str, pool: SharedPool | None) -> None:
        self.layout = layout
        self.planes = {
            plane.name: self._make_plane(index, num_blocks, device, pool) for index, plane in enumerate(layout.planes)
        }

    def copy(self, copies: BlockIds[tuple[int, int]] | np.ndarray) -> None:
        """Copy blocks (from, to) in all planes."""
        for plane in self.planes.values():
            pairs = torch.tensor(copies, device=plane.device)
            copy_blocks(plane, pairs[:, 0], pairs[:, 1])

    def fill(self, value: float) -> None:
        """Set every slot; tests poison the pool with NaN."""
        for plane in self.planes.values():
            plane.fill_(value)

    def read(self, plane: int, layers: range, block_ids: BlockIds[int]) -> bytes:
        """BlockBytes over device tensors."""
        records = self._records(plane, layers, block_ids)
        return records.contiguous().cpu().view(torch.uint8).numpy().tobytes()

    @torch.inference_mode()
    def write(self, plane: int, layers: range, block_ids: BlockIds[int], payload: memoryview) -> None:
        check_length(self.layout.planes[plane], layers, block_ids, payload)
        tensor = self.planes[self.layout.planes[plane].name]
        new = torch.frombuffer(bytearray(payload), dtype=tensor.dtype)
        shape = (len(layers), len(block_ids), *tensor.shape[2:])
        tensor[layers.start : layers.stop, list(block_ids)] = new.view(shape).to(tensor.device)

    @torch.inference_mode()
    def gather(self, plane: int, layers: range, block_ids: BlockIds[int], slot: memoryview) -> None:
        """Records [layers, blocks] of one plane into a slot of their length; returns when they are there."""
        check_length(self.layout.planes[plane], layers, block_ids, slot)
        records, target = self._flat(plane), self._in_slot(plane, layers, slot)
        made = target if records.device == target.device else torch.empty_like(target, device=records.device)
        ids = torch.tensor(block_ids, device=records.device)
        record_copies(records.device).gather(records, layers.start, ids, made)
        if made is not target:
            target.copy_(made)  # waits for the device; faster where the ring is pinned

    @torch.inference_mode()
    def scatter(self, plane: int, layers: range, block_ids: BlockIds[int], slot: memoryview) -> None:
        """The inverse; returns when the slot may be used again."""
        check_length(self.layout.planes[plane], layers, block_ids, slot)
        records = self._flat(plane)
        new = self._in_slot(plane, layers, slot).to(records.device)
        record_copies(records.device).scatter(records, layers.start, torch.tensor(block_ids, device=new.device), new)

    def _flat(self, plane: int) -> torch.Tensor:
        """[layers, blocks, elements of a record] of one plane, where they lie."""
        return self.planes[self.layout.planes[plane].name].flatten(2)

    def _in_slot(self, plane: int, layers: range, slot: memoryview) -> torch.Tensor:
        """[layers, blocks, elements of a record], where a slot's bytes lie."""
        about = self.layout.planes[plane]
        dtype = DTYPES[about.dtype]
        return torch.frombuffer(slot, dtype=dtype).view(len(layers), -1, about.bytes_per_block // dtype.itemsize)

    def _records(self, plane: int, layers: range, block_ids: BlockIds[int]) -> torch.Tensor:
        return self.planes[self.layout.planes[plane].name][layers.start : layers.stop, list(block_ids)]

    def _make_plane(self, index: int, num_blocks: int, device: str, pool: SharedPool | None) -> torch.Tensor:
        plane = self.layout.planes[index]
        shape = (plane.num_slots, num_blocks, *plane.block_shape)
        dtype = DTYPES[plane.dtype]
        if pool is None:
            return torch.zeros(shape, dtype=dtype, device=device)
        count = num_blocks * plane.num_slots * plane.bytes_per_block // dtype.itemsize
        offset = self.layout.plane_offset(index, num_blocks)
        return torch.frombuffer(pool.memory, dtype=dtype, count=count, offset=offset).view(shape)
