"""Which kernel computes what: chosen here, by device and type, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Groups
from dataclasses import dataclass
from typing import Literal

import torch

from kernels.backend import Backend
from kernels.cpu import attention as cpu_attention
from kernels.cpu.native.backend import NativeBackend
from kernels.cpu.native.library import NAMES, has_amx, load_library
from kernels.cpu.packed import PackedMatrix, can_pack
from kernels.reference import records
from kernels.reference.attention import weigh_by_tiles
from kernels.reference.backend import TorchBackend
from kernels.reference.ladder import Weigh
from kernels.reference.matrix import Matrix, PlainMatrix

# New tokens of one sequence whose scores are computed at once. On a CPU these should stay in its second-level cache;
# elsewhere few launches matter more.
_CPU_QUERY_TILE = 64
_QUERY_TILE = 256

Kernels = Literal["auto", "torch", "triton"]
CopyRecords = Callable[[torch.Tensor, int, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class RecordCopies:
    """Between a plane's scattered blocks and a contiguous slot (kernels/reference/records.py)."""

    gather: CopyRecords
    scatter: CopyRecords


def record_copies(device: torch.device) -> RecordCopies:
    """How records leave and enter a pool there."""
    if device.type == "cuda":
        from kernels.triton import records as fast  # Triton is there where CUDA is

        return RecordCopies(fast.gather_records, fast.scatter_records)
    return RecordCopies(records.gather_records, records.scatter_records)


def prepare(weight: torch.Tensor) -> Matrix:
    """The weight [out, in] of a linear layer, ready to be multiplied by. May be a copy: drop the original."""
    if weight.device.type == "cpu" and can_pack(weight.dtype):
        return PackedMatrix.of(weight)
    return PlainMatrix(weight)


def backend_for(like: torch.Tensor, kernels: Kernels, is_invariant: bool) -> Backend:
    """What computes layers on this tensor's device for its type. auto: Triton's kernels on a CUDA device, on a
    processor with AVX-512 or AVX2 our own code, which a compiler makes once for a machine, else torch. is_invariant: a
    row's bits must not depend on how many rows there are (`Backend.settle`)."""
    if kernels == "triton" or (kernels == "auto" and like.device.type == "cuda"):
        from kernels.triton.backend import TritonBackend  # Triton is there where CUDA is

        return TritonBackend(like, is_invariant)
    if like.device.type == "cpu" and like.dtype in NAMES and kernels == "auto":
        library = load_library()
        if library is not None:
            is_tiled = not is_invariant and like.dtype == torch.bfloat16 and has_amx() and can_pack(like.dtype)
            return NativeBackend(library, like.dtype, torch.get_num_threads(), is_tiled)
    return TorchBackend(like, prepare, weigh_for(like.device, like.dtype), query_tile(like.device))


def pin_threads(backend: Backend, cores: Groups[int]) -> None:
    """Each thread that computes on one of these cores, where the backend's threads are ours; torch's are left to run on
    all that this process may use."""
    if cores and isinstance(backend, NativeBackend):
        backend.pin(cores)


def weigh_for(device: torch.device, dtype: torch.dtype) -> Weigh:
    """How attention turns scores into weights and weighs values of this type."""
    return cpu_attention.weigh if device.type == "cpu" and dtype == torch.float32 else weigh_by_tiles


def query_tile(device: torch.device) -> int:
    """Most new tokens of one sequence whose scores should be computed at once."""
    return _CPU_QUERY_TILE if device.type == "cpu" else _QUERY_TILE
