"""Memory for weights, in huge pages where the system has them: a step reads all of it, and finds fewer pages faster
(python -m benchmarks.roofline reads a buffer in pages of either size)."""

from __future__ import annotations

import mmap

import torch

_HUGE = 2 * 2**20
_CHUNK = 16 * _HUGE
_ALIGNMENT = 64  # a cache line


class Space:
    """Hands out parts of large chunks. A chunk is freed with the last of its parts."""

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> torch.Tensor:
        """[size] uint8, zero, that begins at a cache line."""
        whole = -(-size // _ALIGNMENT) * _ALIGNMENT
        if whole > len(self._rest):
            self._rest = _chunk(max(whole, _CHUNK))
        taken, self._rest = self._rest[:size], self._rest[whole:]
        return taken


def _chunk(size: int) -> torch.Tensor:
    memory = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return whole[-whole.data_ptr() % _HUGE :]
