"""The backend over the C++ library: fused layers, weights packed once, attention that reads blocks where they lie.

A row's bits depend on nothing but itself, so there are no row counts to pad to. Its rounding is the reference's, but
for sums that stay in float32 where the reference rounds them to bfloat16 on the way.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from collections.abc import Sequence as Groups
from dataclasses import dataclass

import numpy as np
import torch

from kernels.backend import Agree, DenseLayer, Gate, GroupCalls, GroupPlace, Heads, Norms
from kernels.cpu.native.library import (
    AttentionStruct,
    GroupStruct,
    LayerStruct,
    PassStruct,
    StoreStruct,
    WeightStruct,
)
from kernels.cpu.native.space import Space
from kernels.reference.attention import first_key

_FORMS = {torch.float32: 0, torch.bfloat16: 1}  # products.h, Form
_FINISHES: dict[Gate | None, int] = {None: 0, "silu": 1, "gelu_tanh": 2}
_NAMES = {torch.float32: "float", torch.bfloat16: "bf16"}
_PANEL = 32  # columns, products.h
_SPAN = 5  # numbers of a Span, attention.h


class NativeBackend:
    """Layers of float32 or bfloat16 on this processor."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype, num_threads: int) -> None:
        """The library's threads are all engines' of this process: the last count holds. What torch still computes is
        small, and its threads, which spin after each call, would keep ours from the processor."""
        self.library = library
        self.dtype = dtype
        library.set_threads(num_threads)
        torch.set_num_threads(1)
        self._space = Space()
        self._add_norm = getattr(library, f"add_rms_norm_{_NAMES[dtype]}")

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None, gate: Gate | None = None) -> NativeLinear:
        return NativeLinear(self.library, self._space, weight.contiguous(), bias, gate)

    def attention(self, heads: Heads, norms: Norms) -> NativeAttention:
        return NativeAttention(self.library, self.dtype, heads, norms)

    def stack(self, layers: Groups[DenseLayer], heads: Heads, norms: Norms) -> NativeStack:
        return NativeStack(self.library, self.dtype, layers, heads, norms)

    def settle(self, heads: Heads, block_size: int, agree: Agree) -> None:
        """It always is so."""

    def pad(self, rows: int) -> int:
        return rows

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


class NativeLinear:
    """A weight in panels (products.h). Holds no plain copy of it."""

    def __init__(
        self, library: ctypes.CDLL, space: Space, weight: torch.Tensor, bias: torch.Tensor | None, gate: Gate | None
    ) -> None:  # fmt: skip
        """weight: [out, in], `in` even for bfloat16."""
        rows, num_k = weight.shape
        self._multiply = library.multiply
        self._dtype = weight.dtype
        self._num_columns = rows // 2 if gate else rows
        self.struct = WeightStruct(
            form=_FORMS[weight.dtype], num_k=num_k, num_columns=self._num_columns, finish=_FINISHES[gate]
        )
        self._reference = ctypes.byref(self.struct)
        self._bias = _panelled(bias, gate) if bias is not None else None
        self.struct.bias = self._bias.data_ptr() if self._bias is not None else None
        self._panels = space.take(library.packed_bytes(self._reference))
        self.struct.panels = self._panels.data_ptr()
        library.pack_weight(self._reference, weight.data_ptr(), self.struct.panels)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        num_rows = x.shape[0]
        out = x.new_empty(num_rows, self._num_columns)
        self._multiply(self._reference, x.data_ptr(), num_rows, out.data_ptr(), self._dtype is torch.float32)
        return out


def _panelled(bias: torch.Tensor, gate: Gate | None) -> torch.Tensor:
    """A bias in the order of panels' columns: gated, 16 of the gate and the 16 that it gates."""
    halves = bias.float().chunk(2) if gate else (bias.float(),)
    width = _PANEL // len(halves)
    whole = -(-len(halves[0]) // width) * width
    padded = [torch.nn.functional.pad(half, (0, whole - len(half))).view(-1, width) for half in halves]
    return torch.cat(padded, dim=1).flatten().contiguous()


@dataclass(frozen=True, slots=True)
class Turns:
    """Tables [max_context, head_dim / 2], and the position [rows] of each row."""

    cos: torch.Tensor
    sin: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True, slots=True)
class Plan:
    """spans: [num_seqs, _SPAN] int64; tables: block ids, one sequence after the other."""

    spans: np.ndarray
    tables: np.ndarray
    block_size: int
    window: int


class NativeAttention:
    """Two calls for a layer: one turns and stores, one attends."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype, heads: Heads, norms: Norms) -> None:
        self._heads = heads
        self._norms = norms
        self._shape = (heads.num_heads, heads.num_kv_heads, heads.head_dim)
        self._rope_store = getattr(library, f"rope_store_{_NAMES[dtype]}")
        self._attend = getattr(library, f"attend_{_NAMES[dtype]}")

    def plan(self, groups: Groups[GroupCalls], block_size: int) -> list[object]:
        return [_planned(group, block_size) for group in groups]

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


def _planned(group: GroupCalls, block_size: int) -> Plan:
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


class NativeStack:
    """All layers in one call."""

    def __init__(
        self, library: ctypes.CDLL, dtype: torch.dtype, layers: Groups[DenseLayer], heads: Heads, norms: Norms
    ) -> None:  # fmt: skip
        self._run = getattr(library, f"run_layers_{_NAMES[dtype]}")
        self._layers = layers  # they keep what the structs point to
        self._structs = (LayerStruct * len(layers))(*map(_layer_struct, layers))
        self._cache: tuple[int, ...] = ()  # what the structs point to in it
        self._heads = heads
        self._norms = norms

    def __call__(
        self, hidden: torch.Tensor, k: torch.Tensor, v: torch.Tensor, places: Groups[tuple[int, int]],
        groups: Groups[GroupPlace], stored: Callable[[int], None] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        self._point_to(k, v, places)
        x, added = torch.empty_like(hidden), torch.empty_like(hidden)
        about = (GroupStruct * len(groups))(*map(_group_struct, groups))
        turns, heads = groups[0].turns, self._heads
        assert isinstance(turns, Turns)
        step = PassStruct(
            hidden.data_ptr(), x.data_ptr(), added.data_ptr(), turns.positions.data_ptr(), ctypes.addressof(about),
            *hidden.shape, heads.num_heads, heads.num_kv_heads, heads.head_dim, k.shape[3], heads.scale,
            self._norms.eps, self._norms.wide, 0,
        )  # fmt: skip
        if stored is None:
            self._run(ctypes.addressof(self._structs), len(self._structs), step)
        else:
            for number, layer in enumerate(self._structs, start=1):
                self._run(ctypes.addressof(layer), 1, step)
                stored(number)
        return hidden, added

    def _point_to(self, k: torch.Tensor, v: torch.Tensor, places: Groups[tuple[int, int]]) -> None:
        cache = (k.data_ptr(), v.data_ptr())
        if cache == self._cache:
            return
        for layer, (group, slot) in zip(self._structs, places, strict=True):
            layer.k_cache, layer.v_cache, layer.group = k[slot].data_ptr(), v[slot].data_ptr(), group
        self._cache = cache


def _layer_struct(layer: DenseLayer) -> LayerStruct:
    linears = (layer.qkv, layer.out, layer.gate_up, layer.down)
    norms = (
        layer.attention_norm, layer.q_norm, layer.k_norm, layer.attention_out_norm, layer.mlp_norm, layer.mlp_out_norm
    )  # fmt: skip
    structs = [linear.struct for linear in linears if isinstance(linear, NativeLinear)]
    return LayerStruct(*map(ctypes.pointer, structs), *map(pointer, norms))


def _group_struct(place: GroupPlace) -> GroupStruct:
    plan, turns = place.plan, place.turns
    assert isinstance(plan, Plan) and isinstance(turns, Turns)
    return GroupStruct(
        place.block_ids.data_ptr(), plan.tables.ctypes.data, plan.spans.ctypes.data, turns.cos.data_ptr(),
        turns.sin.data_ptr(), len(plan.spans), plan.window,
    )  # fmt: skip


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
