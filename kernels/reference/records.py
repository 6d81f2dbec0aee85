"""Records between a pool's scattered blocks and one contiguous slot: what a transfer takes out and puts in."""

from __future__ import annotations

import torch


def gather_records(plane: torch.Tensor, first_layer: int, block_ids: torch.Tensor, slot: torch.Tensor) -> None:
    """slot[i, j] = plane[first_layer + i, block_ids[j]]. plane: [layers, blocks, width]; slot: [taken, ids, width]."""
    slot[:] = plane[first_layer : first_layer + len(slot), block_ids]


def scatter_records(plane: torch.Tensor, first_layer: int, block_ids: torch.Tensor, slot: torch.Tensor) -> None:
    """The inverse: plane[first_layer + i, block_ids[j]] = slot[i, j]. Block ids must differ."""
    plane[first_layer : first_layer + len(slot), block_ids] = slot
