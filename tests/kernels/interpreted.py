"""Triton's kernels in tests: by the interpreter on a processor, or on a CUDA device where there is one.

Import this before anything of kernels/triton: how a kernel runs is decided when it is loaded.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

ON_DEVICE = torch.cuda.is_available()
if not ON_DEVICE:
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")


def multiply_in_order() -> None:
    """The interpreter's products of tiles are numpy's. On some processors its library gives a row other bits in another
    place of a tile, as no device does. These go by rows."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(
        self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *how: object
    ) -> TensorHandle:
        del self, how
        product = np.einsum("...ik,...kj->...ij", a.data, b.data, dtype=d.data.dtype)
        return TensorHandle(product + d.data, d.dtype.scalar)

    setattr(InterpreterBuilder, "create_dot", create_dot)  # noqa: B010 - what its other parameters are is not ours


if not ON_DEVICE:
    multiply_in_order()

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(ON_DEVICE, reason="the kernels were loaded for the device")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not ON_DEVICE, reason="no CUDA device here")]),
]
EACH_DEVICE = pytest.mark.parametrize("device", DEVICES)
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def random(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)
