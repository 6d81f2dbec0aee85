"""Records between a pool's scattered blocks and one contiguous slot, a launch for each frame.

One program copies TILE elements of one record. Offsets are 64-bit: a pool has more elements than 32 bits count.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = 1024  # elements of a program: enough for wide loads, and records are seldom shorter


@triton.jit
def _copy_records(
    plane, block_ids, slot, first_layer, num_ids, layer_stride, width, TO_SLOT: tl.constexpr, TILE: tl.constexpr
):  # plane: [layers, blocks, width]; slot: [taken layers, num_ids, width]
    record = tl.program_id(0).to(tl.int64)  # of the slot: [layers, ids]
    layer = first_layer + record // num_ids
    block = tl.load(block_ids + record % num_ids).to(tl.int64)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = at < width
    in_plane = plane + layer * layer_stride + block * width + at
    in_slot = slot + record * width + at
    if TO_SLOT:
        tl.store(in_slot, tl.load(in_plane, mask=inside), mask=inside)
    else:
        tl.store(in_plane, tl.load(in_slot, mask=inside), mask=inside)


def gather_records(plane: torch.Tensor, first_layer: int, block_ids: torch.Tensor, slot: torch.Tensor) -> None:
    """As kernels/reference/records.py. All contiguous and on one device."""
    _launch(plane, first_layer, block_ids, slot, to_slot=True)


def scatter_records(plane: torch.Tensor, first_layer: int, block_ids: torch.Tensor, slot: torch.Tensor) -> None:
    """As kernels/reference/records.py. All contiguous and on one device."""
    _launch(plane, first_layer, block_ids, slot, to_slot=False)


def _launch(plane: torch.Tensor, first_layer: int, block_ids: torch.Tensor, slot: torch.Tensor, to_slot: bool) -> None:
    num_layers, num_ids, width = slot.shape
    if slot.numel():
        grid = (num_layers * num_ids, triton.cdiv(width, TILE))
        _copy_records[grid](
            plane, block_ids, slot, first_layer, num_ids, plane.stride(0), width,
            to_slot, TILE,  # pyright: ignore[reportArgumentType] (Triton wraps them)
        )  # fmt: skip
