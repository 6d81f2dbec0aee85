"""Weights in oneDNN's own order, packed once: up to twice as fast for 2 to 64 rows as F.linear.

F.linear goes through MKL, which packs the weight anew for every product, and whose order of additions depends on the
row count. Packed for several rows, oneDNN takes one kernel for all counts, so that they agree bit for bit (packed for
one row, it has another kernel for it). A RowLadder still tries it on each machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

_ROWS_PACKED_FOR = 64


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """Holds no plain copy of the weight."""

    shape: torch.Size
    like: torch.Tensor  # empty, of the weight's type
    packed: torch.Tensor  # opaque, of oneDNN's layout

    @staticmethod
    def of(weight: torch.Tensor) -> PackedMatrix:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_PACKED_FOR)
        return PackedMatrix(weight.shape, weight.new_empty(0), packed)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")

    def filled_with(self, weight: torch.Tensor) -> PackedMatrix:
        return PackedMatrix.of(weight.to(self.like).contiguous())


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Has this machine's torch the product, for this type? bfloat16 wants AVX-512, for example."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        PackedMatrix.of(torch.zeros(16, 16, dtype=dtype)).multiply(torch.zeros(2, 16, dtype=dtype), None)
    except (AttributeError, RuntimeError):  # not there, or refused
        return False
    return True
