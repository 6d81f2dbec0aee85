"""Attention over the C++ library: one call turns and stores, one attends (layers.h, attention.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as Groups
from dataclasses import dataclass

import numpy as np
import torch

from kernels.backend import GroupCalls, GroupPlace, Heads, Norms, Turns
from kernels.cpu.native.library import NAMES, AttentionStruct, StoreStruct, pointer
from kernels.reference.attention import first_key

_SPAN = 5  # numbers of a Span, attention.h


@dataclass(frozen=True, slots=True)
class Plan:
    """spans: [num_seqs, _SPAN] int64; tables: block ids, one sequence after the other."""

    spans: np.ndarray
    tables: np.ndarray
    block_size: int
    window: int


class NativeAttention:
    """Implements kernels.backend.Attention."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype, heads: Heads, norms: Norms) -> None:
        self._heads = heads
        self._norms = norms
        self._shape = (heads.num_heads, heads.num_kv_heads, heads.head_dim)
        self._rope_store = getattr(library, f"rope_store_{NAMES[dtype]}")
        self._attend = getattr(library, f"attend_{NAMES[dtype]}")

    def plan(self, groups: Groups[GroupCalls], block_size: int) -> list[object]:
        return [planned(group, block_size) for group in groups]

    def turns(self, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> Turns:
        return Turns(cos, sin, positions)

    def attend(
        self, qkv: torch.Tensor, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, k_cache: torch.Tensor,
        v_cache: torch.Tensor, place: GroupPlace,
    ) -> torch.Tensor:  # fmt: skip
        plan, turns = place.plan, place.turns
        assert isinstance(plan, Plan) and isinstance(turns, Turns)
        num_rows, num_tokens = qkv.shape[0], place.block_ids.shape[0]
        keys, values = k_cache.data_ptr(), v_cache.data_ptr()
        store = StoreStruct(
            pointer(q_norm), pointer(k_norm), keys, values, turns.positions.data_ptr(), place.block_ids.data_ptr(),
            turns.cos.data_ptr(), turns.sin.data_ptr(), num_rows, num_tokens, *self._shape, plan.block_size,
            self._norms.eps, self._norms.wide,
        )  # fmt: skip
        self._rope_store(qkv.data_ptr(), store)
        out = qkv.new_empty(num_rows, self._heads.num_heads * self._heads.head_dim)
        out[num_tokens:].zero_()
        about = AttentionStruct(
            qkv.data_ptr(), keys, values, out.data_ptr(), plan.spans.ctypes.data, plan.tables.ctypes.data,
            len(plan.spans), self._heads.width, *self._shape, plan.block_size, plan.window, self._heads.scale,
        )  # fmt: skip
        self._attend(about)
        return out


def planned(group: GroupCalls, block_size: int) -> Plan:
    spans, tables, size = list[np.ndarray](), list[np.ndarray](), 0
    for call in group.calls:
        num_seqs, width = call.blocks.shape
        span = np.empty((num_seqs, _SPAN), np.int64)
        order = np.arange(num_seqs)
        span[:, 0] = call.rows.start + order * call.num_new
        span[:, 1] = call.num_new
        span[:, 2] = call.starts
        span[:, 3] = [first_key(start, group.window, block_size) for start in call.starts] if group.window else 0
        span[:, 4] = size + order * width
        spans.append(span)
        tables.append(call.blocks.ravel())
        size += call.blocks.size
    window = group.window or 0
    if not spans:
        return Plan(np.empty((0, _SPAN), np.int64), np.empty(0, np.int64), block_size, window)
    return Plan(np.concatenate(spans), np.concatenate(tables), block_size, window)
