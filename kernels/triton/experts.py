"""A layer's experts in a few launches: each expert's rows gathered, multiplied by its weights, and added up by row.

Nothing of it waits for the device (routing.py). A row's bits depend on nothing but itself, as far as tiles have one
shape (linear.py): where bits may depend on the batch, few rows get small tiles and many get large ones.
"""

# Triton's language is Python to its parser, not to its types.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.backend import Gate, Routing
from kernels.triton.layers import gate_and_mul
from kernels.triton.product import precision_for, product_of_runs, tile_of
from kernels.triton.routing import FIELDS, Routes, route

_GROUP = 8  # tiles of rows that are computed side by side
_WIDTH_TILE = 1024  # elements of a program that adds up


@dataclass(frozen=True, slots=True)
class Tiling:
    """What a program computes: rows times columns, so many elements of both at a time."""

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int


# As large as registers hold (`python -m benchmarks.kernel_code`); what is fastest is yet to be measured.
_WIDE = Tiling(64, 64, 16, num_warps=8, num_stages=4)  # of float32
_ONE_TILING = Tiling(64, 64, 64, num_warps=4, num_stages=4)
_FEW_ROWS = Tiling(16, 64, 128, num_warps=4, num_stages=4)
_MANY_ROWS = Tiling(128, 128, 64, num_warps=8, num_stages=3)
_FEW, _MANY = 16, 96  # rows of an expert, on average


@triton.jit(do_not_specialize=["num_tiles"])
def _multiply_by_expert(
    x, weight, rows, tiles, out, num_tiles, num_columns, num_k,
    GATHERED: tl.constexpr, WHOLE: tl.constexpr, FIELDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    INNER: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # x: [num_slots, num_k], GATHERED: by `rows` [num_slots]; weight: [num_experts, num_columns, num_k];
    # tiles: [num_tiles, FIELDS]; out: [num_slots, num_columns]; WHOLE: num_k is whole INNERs
    tile, column_tile = tile_of(tl.program_id(0), num_tiles, tl.cdiv(num_columns, COLUMNS), GROUP)
    fields = tiles + tile * FIELDS
    expert, first, stop = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2)
    if first >= stop:
        return
    slot = first + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = (slot < stop)[:, None], (column < num_columns)[None, :]
    row = tl.load(rows + slot, mask=slot < stop, other=0) if GATHERED else slot
    left = x + row.to(tl.int64)[:, None] * num_k
    right = weight + (expert.to(tl.int64) * num_columns + column)[None, :] * num_k
    sums = product_of_runs(left, right, is_row, is_column, num_k, WHOLE, ROWS, COLUMNS, INNER, PRECISION)
    place = out + slot.to(tl.int64)[:, None] * num_columns + column[None, :]
    tl.store(place, sums.to(out.dtype.element_ty), mask=is_row & is_column)


@triton.jit
def _add_up(
    results, slots, weights, out, width, per_row, TILE: tl.constexpr
):  # results: [num_slots, width]; slots, weights: [rows, per_row]; out: [rows, width]
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = at < width
    sums = tl.zeros((TILE,), tl.float32)
    for choice in range(per_row):
        slot = tl.load(slots + row * per_row + choice).to(tl.int64)
        result = tl.load(results + slot * width + at, mask=inside, other=0.0).to(tl.float32)
        sums += result * tl.load(weights + row * per_row + choice)
    tl.store(out + row * width + at, sums.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class TritonMixture:
    """Implements kernels.backend.Mixture. gate_up: [num_experts, 2 * inner, hidden]; down: [num_experts, hidden,
    inner]."""

    gate_up: torch.Tensor
    down: torch.Tensor
    gate: Gate
    routing: Routing
    is_invariant: bool

    def __call__(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        tiling = tiling_for(len(x), self.routing, self.down.dtype, self.is_invariant)
        routes = route(logits, self.routing, tiling.rows)
        inner = gate_and_mul(_multiply(x, self.gate_up, routes, tiling, is_gathered=True), self.gate)
        return _sums(_multiply(inner, self.down, routes, tiling, is_gathered=False), routes)


def tiling_for(num_rows: int, routing: Routing, dtype: torch.dtype, is_invariant: bool) -> Tiling:
    """For so many rows: the same for all, where bits must not depend on it."""
    if dtype == torch.float32:
        return _WIDE
    if is_invariant:
        return _ONE_TILING
    each = num_rows * routing.per_row / routing.num_experts
    return _FEW_ROWS if each <= _FEW else _MANY_ROWS if each >= _MANY else _ONE_TILING


def _multiply(
    x: torch.Tensor, weight: torch.Tensor, routes: Routes, tiling: Tiling, is_gathered: bool
) -> torch.Tensor:  # fmt: skip
    """x: [rows, in] if it is gathered, else [num_slots, in] -> [num_slots, out]. weight: [num_experts, out, in]"""
    num_tiles, (_, num_columns, num_k) = len(routes.tiles), weight.shape
    out = x.new_empty(len(routes.rows), num_columns)
    if num_tiles:
        _multiply_by_expert[(num_tiles * triton.cdiv(num_columns, tiling.columns),)](
            x, weight, routes.rows, routes.tiles, out, num_tiles, num_columns, num_k, GATHERED=is_gathered,
            WHOLE=num_k % tiling.inner == 0, FIELDS=FIELDS, ROWS=tiling.rows, COLUMNS=tiling.columns,
            INNER=tiling.inner, GROUP=_GROUP, PRECISION=precision_for(x), num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
        )  # fmt: skip
    return out


def _sums(results: torch.Tensor, routes: Routes) -> torch.Tensor:
    """results: [num_slots, width] -> [rows, width]: each times its weight, in rising order of expert id. Products are
    rounded before they are added, as the reference's are."""
    (num_rows, per_row), width = routes.slots.shape, results.shape[1]
    out = results.new_empty(num_rows, width)
    if num_rows:
        _add_up[num_rows, triton.cdiv(width, _WIDTH_TILE)](
            results, routes.slots, routes.weights, out, width, per_row, TILE=_WIDTH_TILE, enable_fp_fusion=False
        )  # fmt: skip
    return out
