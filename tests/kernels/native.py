"""Native code beside its reference: what the tests of it share. Skips them where it cannot be had."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.backend import Backend, Call, GroupCalls, GroupPlace, Heads, Norms
from kernels.cpu.native.backend import NativeBackend
from kernels.cpu.native.library import load_library
from kernels.dispatch import backend_for
from kernels.reference.attention import first_key, tile_tokens
from tests.kernels.test_attention import Case

DTYPES = [torch.float32, torch.bfloat16]
NORMS = Norms(1e-5, wide=False)


def native(dtype: torch.dtype, num_threads: int = 1, is_tiled: bool = False) -> NativeBackend:
    library = load_library()
    if library is None:
        pytest.skip("no native code on this machine: it wants AVX2 and a C++ compiler")
    return NativeBackend(library, dtype, num_threads, is_tiled)


def reference(dtype: torch.dtype) -> Backend:
    return backend_for(torch.empty(0, dtype=dtype), "torch", is_invariant=False)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def attend(backend: Backend, case: Case, window: int | None = None, which: slice = slice(None)) -> torch.Tensor:
    """The case's last tokens, unturned, through a backend's attention: [num_seqs, num_new, num_heads, head_dim]."""
    num_new, num_heads, head_dim = case.queries[0].shape
    num_kv_heads, block_size = case.k_cache.shape[1:3]
    heads = Heads(num_heads, num_kv_heads, head_dim, head_dim**-0.5)
    lengths, blocks = case.lengths[which], case.blocks[which]
    starts = [length - num_new for length in lengths]
    qkv = torch.cat([
        torch.cat((queries, keys[-num_new:], values[-num_new:]), dim=1)
        for queries, keys, values in zip(case.queries[which], case.keys[which], case.values[which], strict=True)
    ]).flatten(1)  # fmt: skip
    positions = torch.cat([torch.arange(start, start + num_new) for start in starts])
    sequence = torch.arange(len(starts)).repeat_interleave(num_new)
    attention = backend.attention(heads, NORMS)
    firsts = [first_key(start, window, block_size) // block_size for start in starts]
    width = tile_tokens(block_size) // block_size
    width *= -(-max(-(-length // block_size) - first for length, first in zip(lengths, firsts, strict=True)) // width)
    padded = torch.nn.functional.pad(blocks, (0, width))
    table = np.stack([row[first : first + width].numpy() for row, first in zip(padded, firsts, strict=True)])
    call = Call(slice(0, len(qkv)), tuple(starts), num_new, table)
    (plan,) = attention.plan([GroupCalls((call,), window)], block_size)
    half = (4096, head_dim // 2)
    place = GroupPlace(
        blocks[sequence, positions // block_size].contiguous(), positions % block_size,
        attention.turns(torch.ones(half), torch.zeros(half), positions), plan,
    )  # fmt: skip
    out = attention.attend(qkv.contiguous(), None, None, case.k_cache, case.v_cache, place)
    return out.view(-1, num_new, num_heads, head_dim)
