"""Which experts rows go to, found on the device, and an expert's rows side by side.

1. `_pick`, for each row: softmax over all experts, the greatest few, and how many rows each expert has.
2. `_group`, for each expert: its pairs of a row and an expert get slots that follow those of the experts before it, and
   are cut into tiles.
Shapes follow from the number of rows alone, so nothing is waited for: how many tiles there are only the device knows,
and tables have room for the most.
"""

# Triton's language is Python to its parser, not to its types.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.backend import Routing

FIELDS = 3  # of a tile: expert, first slot, stop
_BLOCK = 1024  # pairs that are looked through at once


@dataclass(frozen=True, slots=True)
class Routes:
    """Where each row goes: all int32 but the weights.

    weights, slots: [rows, per_row] float32 and int32, in rising order of expert id
    rows: [rows * per_row], of each slot
    tiles: [most_tiles, FIELDS], slots of one expert; unused ones are zeros
    """

    weights: torch.Tensor
    slots: torch.Tensor
    rows: torch.Tensor
    tiles: torch.Tensor


@triton.jit
def _pick(
    logits, weights, ids, counts, num_experts, per_row, NORMALIZE: tl.constexpr, WIDTH: tl.constexpr
):  # logits: [rows, num_experts]; weights, ids: [rows, per_row]; counts: [num_experts]; WIDTH: that holds all experts
    row, expert = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside = expert < num_experts
    wide = tl.load(logits + row * num_experts + expert, mask=inside, other=float("-inf")).to(tl.float32)
    powers = tl.exp(wide - tl.max(wide, 0))
    shares = powers / tl.sum(powers, 0)
    left = tl.where(inside, tl.where(shares == shares, shares, 0.0), -1.0)  # rows of NaN have experts, too
    is_picked = expert < 0
    total = 0.0
    for _ in range(per_row):
        greatest, best = tl.max(left, 0, return_indices=True, return_indices_tie_break_left=True)
        total += greatest
        is_picked = is_picked | (expert == best)
        left = tl.where(expert == best, -1.0, left)
    if NORMALIZE:
        shares /= total
    place = row * per_row + tl.cumsum(is_picked.to(tl.int32), 0) - 1
    tl.store(weights + place, shares, mask=is_picked)
    tl.store(ids + place, expert, mask=is_picked)
    tl.atomic_add(counts + expert, 1, mask=is_picked)


@triton.jit(do_not_specialize=["num_pairs"])
def _group(
    ids, counts, slots, rows, tiles, num_pairs, per_row,
    TILE_ROWS: tl.constexpr, FIELDS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # ids, slots, rows: [num_pairs]; counts: [num_experts]; tiles: [most_tiles, FIELDS]
    expert, other = tl.program_id(0), tl.arange(0, WIDTH)
    before = tl.load(counts + other, mask=other < expert, other=0)
    slot, tile = tl.sum(before, 0), tl.sum(tl.cdiv(before, TILE_ROWS), 0)
    stop = slot + tl.load(counts + expert)
    for first in range(slot, stop, TILE_ROWS):
        tl.store(tiles + tile * FIELDS, expert)
        tl.store(tiles + tile * FIELDS + 1, first)
        tl.store(tiles + tile * FIELDS + 2, tl.minimum(first + TILE_ROWS, stop))
        tile += 1
    pair = tl.arange(0, BLOCK)
    while slot < stop:
        is_mine = tl.load(ids + pair, mask=pair < num_pairs, other=-1) == expert
        place = slot + tl.cumsum(is_mine.to(tl.int32), 0) - 1
        tl.store(slots + pair, place, mask=is_mine)
        tl.store(rows + place, pair // per_row, mask=is_mine)
        slot += tl.sum(is_mine.to(tl.int32), 0)
        pair += BLOCK


def route(logits: torch.Tensor, routing: Routing, tile_rows: int) -> Routes:
    """logits: [rows, num_experts], contiguous. Tiles have up to tile_rows slots."""
    num_rows, per_row, num_experts = len(logits), routing.per_row, routing.num_experts
    num_pairs, width = num_rows * per_row, triton.next_power_of_2(num_experts)
    num_tiles = most_tiles(num_pairs, num_experts, tile_rows)
    counts, tiles = _zeros(logits.device, (num_experts,), (num_tiles, FIELDS))
    weights = torch.empty(num_rows, per_row, dtype=torch.float32, device=logits.device)
    ids, slots = (torch.empty(num_rows, per_row, dtype=torch.int32, device=logits.device) for _ in "ab")
    rows = ids.new_empty(num_pairs)
    if num_rows:
        _pick[(num_rows,)](
            logits, weights, ids, counts, num_experts, per_row, NORMALIZE=routing.normalize, WIDTH=width, num_warps=1
        )  # fmt: skip
        _group[(num_experts,)](
            ids, counts, slots, rows, tiles, num_pairs, per_row, TILE_ROWS=tile_rows, FIELDS=FIELDS, WIDTH=width,
            BLOCK=_BLOCK,
        )  # fmt: skip
    return Routes(weights, slots, rows, tiles)


def most_tiles(num_pairs: int, num_experts: int, tile_rows: int) -> int:
    """Of so many pairs, however they fall to experts: all of these have some, and the rest fills whole tiles."""
    in_use = min(num_pairs, num_experts)
    return in_use + (num_pairs - in_use) // tile_rows


def _zeros(device: torch.device, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """int32, in one launch."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    parts = torch.zeros(sum(sizes), dtype=torch.int32, device=device).split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
