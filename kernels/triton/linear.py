"""Products whose rows do not depend on each other: one tiling and one order of additions for any number of rows.

cuBLAS chooses its code by the number of rows. This one is for engines that promise batch invariance, and costs what
`python -m benchmarks.gpu_engine` says.
"""

# Triton's language is Python to its parser, not to its types.
# pyright: reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.product import precision_for, product_of_runs, tile_of

_ROWS, _COLUMNS = 64, 64
_INNER, _NUM_WARPS = {torch.float32: 16}, {torch.float32: 8}  # as much as registers hold
_GROUP = 8  # tiles of rows that are computed side by side


@triton.jit(do_not_specialize=["num_rows"])
def _multiply(
    x, weight, bias, out, num_rows, num_columns, num_k,
    HAS_BIAS: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # x: [num_rows, num_k]; weight: [num_columns, num_k]; out: [num_rows, num_columns]; WHOLE: num_k is whole INNERs
    row_tile, column_tile = tile_of(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.cdiv(num_columns, COLUMNS), GROUP)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = (row < num_rows)[:, None], (column < num_columns)[None, :]
    left, right = x + row.to(tl.int64)[:, None] * num_k, weight + column.to(tl.int64)[None, :] * num_k
    sums = product_of_runs(left, right, is_row, is_column, num_k, WHOLE, ROWS, COLUMNS, INNER, PRECISION)
    if HAS_BIAS:
        sums += tl.load(bias + column, mask=column < num_columns, other=0.0).to(tl.float32)[None, :]
    place = out + row.to(tl.int64)[:, None] * num_columns + column[None, :]
    tl.store(place, sums.to(out.dtype.element_ty), mask=is_row & is_column)


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [rows, in] @ weight [out, in].T + bias [out] -> [rows, out]. All contiguous."""
    num_rows, num_k = x.shape
    num_columns, inner = weight.shape[0], _INNER.get(x.dtype, 64)
    out = x.new_empty(num_rows, num_columns)
    if num_rows:
        _multiply[(triton.cdiv(num_rows, _ROWS) * triton.cdiv(num_columns, _COLUMNS),)](
            x, weight, x if bias is None else bias, out, num_rows, num_columns, num_k,
            HAS_BIAS=bias is not None, WHOLE=num_k % inner == 0, ROWS=_ROWS, COLUMNS=_COLUMNS, INNER=inner,
            GROUP=_GROUP, PRECISION=precision_for(x), num_warps=_NUM_WARPS.get(x.dtype, 4), num_stages=4,
        )  # fmt: skip
    return out
