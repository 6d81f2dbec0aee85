"""The product of two tiles, with what it needs to be right wherever kernels run."""

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


def precision_for(x: torch.Tensor) -> str:
    """PRECISION for operands of this type. Float32 is multiplied as such, not as tf32; bfloat16, whose products are
    exact in float32 anyway, is widened where the interpreter could not multiply it."""
    if x.dtype == torch.float32:
        return "ieee"
    return "wide" if x.device.type == "cpu" else "tf32"  # tf32 is Triton's default, and means nothing for other types
