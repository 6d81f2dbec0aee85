"""Pinned memory: host memory that a CUDA device copies from and to by itself. Not yet run on a device."""

from __future__ import annotations

import mmap
from collections.abc import Callable

import torch

from engine.errors import ModelError


def pin(memory: mmap.mmap) -> Callable[[], None]:
    """Pin this memory for all devices of this process; returns what lets go of it, before the memory is unmapped.

    Raises ModelError if the system does not allow it (`ulimit -l`)."""
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    runtime = torch.cuda.cudart()
    assert runtime is not None, "a device of this kind is there"
    error = runtime.cudaHostRegister(address, len(memory), 0)
    if error != runtime.cudaError.success:
        raise ModelError(f"{len(memory)} bytes of the ring cannot be pinned: {error}", param="kv_transfer.ring_bytes")
    return lambda: runtime.cudaHostUnregister(address)
