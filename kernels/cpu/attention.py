"""Softmax and weighted sum of attention in fewer passes over the scores than the reference, for float32 on a CPU.

Why the bits of a row still depend on nothing but its own scores: softmax goes row by row; it adds what lies 8 or 16
apart, first to last, and then across, so whole tiles of zeros before and after change nothing. A RowLadder tries it on
each machine. Values are weighed tile by tile, in order, as in the reference.
"""

from __future__ import annotations

import torch


def weigh(scores: torch.Tensor, values: torch.Tensor, tile: int, row_tile: int | None) -> torch.Tensor:
    """As kernels.reference.attention.weigh_by_tiles, but takes float32 only. Overwrites `scores`."""
    weights = torch.softmax(scores, dim=-1, out=scores)
    if row_tile is None or weights.shape[1] <= row_tile:
        return _add_tiles(weights, values, tile)
    return torch.cat([_add_tiles(part, values, tile) for part in weights.split(row_tile, dim=1)], dim=1)


def _add_tiles(weights: torch.Tensor, values: torch.Tensor, tile: int) -> torch.Tensor:
    """[batch, rows, keys] @ [batch, keys, head_dim], in order of the tiles of keys."""
    out = torch.bmm(weights[..., :tile], values[:, :tile])
    for start in range(tile, weights.shape[2], tile):
        part = slice(start, start + tile)
        out.baddbmm_(weights[..., part], values[:, part])
    return out
