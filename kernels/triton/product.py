"""Products of tiles, with what they need to be right wherever kernels run."""

# Triton's language is Python to its parser, not to its types.
# pyright: reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def product(a, b, sums, PRECISION: tl.constexpr):
    """a @ b + sums, in float32."""
    if PRECISION == "wide":
        sums = tl.dot(a.to(tl.float32), b.to(tl.float32), sums)
    else:
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    return sums


@triton.jit
def product_of_runs(
    left, right, is_row, is_column, num_k,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS] in float32: products of rows of num_k elements, added in one order whatever the rows are.

    left: [ROWS, 1], right: [1, COLUMNS], where each begins; is_row, is_column: of their shapes, may it be read?
    WHOLE: num_k is whole INNERs"""
    k = tl.arange(0, INNER)
    left += k[None, :]
    right += k[:, None]
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for at in range(0, num_k, INNER):
        if WHOLE:
            a = tl.load(left, mask=is_row, other=0.0)
            b = tl.load(right, mask=is_column, other=0.0)
        else:
            inside = k < num_k - at
            a = tl.load(left, mask=is_row & inside[None, :], other=0.0)
            b = tl.load(right, mask=is_column & inside[:, None], other=0.0)
        sums = product(a, b, sums, PRECISION)
        left += INNER
        right += INNER
    return sums


@triton.jit
def tile_of(program, row_tiles, column_tiles, GROUP: tl.constexpr):
    """A program's tile of rows and of columns. GROUP tiles of rows are computed side by side, so that weights are found
    in the second-level cache."""
    in_group = GROUP * column_tiles
    first = program // in_group * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    return first + program % in_group % size, program % in_group // size


def precision_for(x: torch.Tensor) -> str:
    """PRECISION for operands of this type. Float32 is multiplied as such, not as tf32; bfloat16, whose products are
    exact in float32 anyway, is widened where the interpreter could not multiply it."""
    if x.dtype == torch.float32:
        return "ieee"
    return "wide" if x.device.type == "cpu" else "tf32"  # tf32 is Triton's default, and means nothing for other types
