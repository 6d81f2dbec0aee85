"""All dense layers of a model in one call into the C++ library (decoder.h): part by part they are eight calls a layer,
and what Python does between them is a large part of a small model's step."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from collections.abc import Sequence as Groups

import torch

from kernels.backend import DenseLayer, GroupPlace, Heads, Norms, Turns
from kernels.cpu.native.attention import Plan
from kernels.cpu.native.library import NAMES, GroupStruct, LayerStruct, PassStruct, pointer
from kernels.cpu.native.linear import TILED_ROWS, NativeLinear


class NativeStack:
    """Implements kernels.backend.Stack."""

    def __init__(
        self, library: ctypes.CDLL, dtype: torch.dtype, layers: Groups[DenseLayer], heads: Heads, norms: Norms
    ) -> None:  # fmt: skip
        self._run = getattr(library, f"run_layers_{NAMES[dtype]}")
        self._layers = layers  # they keep what the structs point to
        self._structs = (LayerStruct * len(layers))(*map(_layer_struct, layers))
        self._is_tiled = any(isinstance(layer.down, NativeLinear) and layer.down.tiled is not None for layer in layers)
        self._cache: tuple[object, ...] = ()  # the one that the structs point into
        self._heads = heads
        self._norms = norms

    def takes(self, num_rows: int) -> bool:
        return num_rows < TILED_ROWS or not self._is_tiled

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
        cache = (k.data_ptr(), v.data_ptr(), k.shape, tuple(places))  # another cache may come to lie at the same place
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
