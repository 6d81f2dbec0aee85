"""Next tokens over the C++ library (sampling.h), which looks at all of a vocabulary and takes few logarithms."""

from __future__ import annotations

import ctypes

import torch

from kernels.backend import Draws
from kernels.cpu.native.library import DrawsStruct


class NativeChoose:
    """Implements kernels.backend.Choose."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._choose = library.choose

    def __call__(self, logits: torch.Tensor, draws: Draws) -> torch.Tensor:
        logits = logits.contiguous()
        arrays = (draws.temperatures, draws.top_p, draws.min_p, draws.top_k, draws.keys, draws.positions)
        assert all(len(array) == len(logits) for array in arrays)
        out = torch.empty(len(logits), dtype=torch.int64)
        struct = DrawsStruct(*(array.ctypes.data for array in arrays))
        self._choose(logits.data_ptr(), *logits.shape, ctypes.byref(struct), out.data_ptr())
        return out
