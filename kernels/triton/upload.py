"""Many small arrays of a step's numbers onto a device in one copy, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

_ALIGNMENT = 16  # bytes: what Triton's widest load wants of a pointer


def place(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Tensors there that are equal to the arrays, of int32, int64 and float64.

    The copy comes from pinned memory, which torch keeps until the stream has passed it."""
    offsets = offsets_of(arrays)
    host = torch.empty(offsets[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    pack(arrays, offsets, host)
    there = host.to(device, non_blocking=True)
    return views(arrays, offsets, there)


def offsets_of(arrays: Sequence[np.ndarray]) -> list[int]:
    """Where each begins in one buffer, and the buffer's length. Bytes."""
    sizes = [-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays]
    return [0, *np.cumsum(sizes, dtype=np.int64).tolist()]


def pack(arrays: Sequence[np.ndarray], offsets: Sequence[int], host: torch.Tensor) -> None:
    """host: [bytes] uint8."""
    target = host.numpy()
    for array, offset in zip(arrays, offsets, strict=False):
        target[offset : offset + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).ravel()


def views(arrays: Sequence[np.ndarray], offsets: Sequence[int], buffer: torch.Tensor) -> list[torch.Tensor]:
    """Of a packed buffer [bytes] uint8, in the arrays' types and shapes."""
    return [
        buffer[offset : offset + array.nbytes].view(_TYPES[array.dtype.name]).view(array.shape)
        for array, offset in zip(arrays, offsets, strict=False)
    ]


_TYPES = {"int32": torch.int32, "int64": torch.int64, "float64": torch.float64}
