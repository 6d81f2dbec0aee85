"""The backend over the C++ library: fused layers, weights packed once, attention that reads blocks where they lie.

A row's bits depend on nothing but itself, so there are no row counts to pad to. Its rounding is the reference's, but
for sums that stay in float32 where the reference rounds them to bfloat16 on the way.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from collections.abc import Sequence as Groups

import numpy as np
import torch

from kernels.backend import Agree, DenseLayer, Gate, Heads, Norms, Routing
from kernels.cpu.native.attention import NativeAttention
from kernels.cpu.native.library import NAMES, pointer
from kernels.cpu.native.linear import NativeLinear
from kernels.cpu.native.sampling import NativeChoose
from kernels.cpu.native.space import Space
from kernels.cpu.native.stack import NativeStack
from kernels.reference.quantized import Bits


class NativeBackend:
    """Layers of float32 or bfloat16 on this processor."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype, num_threads: int, is_tiled: bool) -> None:
        """The library's threads are all engines' of this process: the last count holds. What torch still computes is
        small, and its threads, which spin after each call, would keep ours from the processor. is_tiled: many rows
        go to oneDNN, whose products may depend on how many there are."""
        self.library = library
        self.dtype = dtype
        library.set_threads(num_threads)
        torch.set_num_threads(1)
        self.choose = NativeChoose(library)
        self._is_tiled = is_tiled
        self._space = Space()
        self._add_norm = getattr(library, f"add_rms_norm_{NAMES[dtype]}")

    def pin(self, cores: Groups[int]) -> None:
        """The caller's thread, which is to take the steps, and each of the library's on one of these."""
        self.library.pin_threads((ctypes.c_int * len(cores))(*cores), len(cores))

    def linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None, gate: Gate | None = None, bits: Bits = 16
    ) -> NativeLinear:  # fmt: skip
        return NativeLinear(self.library, self._space, weight, bias, gate, bits, self._is_tiled)

    def mixture(
        self, gate_ups: Iterable[torch.Tensor], downs: Iterable[torch.Tensor], gate: Gate, routing: Routing, bits: Bits
    ) -> None:
        return None

    def norm_weight(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.float().contiguous()

    def attention(self, heads: Heads, norms: Norms) -> NativeAttention:
        return NativeAttention(self.library, self.dtype, heads, norms)

    def stack(self, layers: Groups[DenseLayer], heads: Heads, norms: Norms) -> NativeStack:
        return NativeStack(self.library, self.dtype, layers, heads, norms)

    def settle(self, heads: Heads, block_size: int, agree: Agree) -> None:
        """It always is so, but for oneDNN's products."""
        if self._is_tiled:
            raise ArithmeticError("this backend was made for speed")

    def pad(self, rows: int) -> int:
        return rows

    def place(self, arrays: Groups[np.ndarray]) -> list[torch.Tensor]:
        return [torch.tensor(array) for array in arrays]

    def norm(self, x: torch.Tensor, weight: torch.Tensor, norms: Norms) -> torch.Tensor:
        return self.add_norm(x, None, weight, norms)[1]

    def add_norm(
        self, hidden: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, norms: Norms
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.empty_like(hidden)
        self._add_norm(
            hidden.data_ptr(), pointer(added), weight.data_ptr(), out.data_ptr(), *hidden.shape, norms.eps, norms.wide,
        )  # fmt: skip
        return hidden, out
