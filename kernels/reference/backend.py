"""The backend in plain torch: any device, any type. What every other one is tested against."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Groups
from dataclasses import dataclass, replace

import numpy as np
import torch

from kernels.backend import Agree, Call, DenseLayer, Gate, GroupCalls, GroupPlace, Heads, Norms, Routing
from kernels.reference.attention import Segment, make_segment, paged_attention, tile_tokens
from kernels.reference.ladder import FREE_LADDERS, Ladders, Weigh, linear, measure_attention, measure_linear
from kernels.reference.layers import GATES, apply_rope, rms_norm, store_kv
from kernels.reference.matrix import Matrix
from kernels.reference.quantized import Bits, quantize


class TorchBackend:
    """`prepare` and `weigh` may be faster than the reference's; `query_tile` is of attention."""

    choose = None

    def __init__(
        self, like: torch.Tensor, prepare: Callable[[torch.Tensor], Matrix], weigh: Weigh, query_tile: int
    ) -> None:  # fmt: skip
        """like: any tensor of the weights' type and device."""
        self.like = like
        self.weigh = weigh
        self.query_tile = query_tile
        self.ladders = FREE_LADDERS
        self._prepare = prepare
        self._shapes: dict[torch.Size, Matrix] = {}  # one weight of each shape

    def linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None, gate: Gate | None = None, bits: Bits = 16
    ) -> TorchLinear:  # fmt: skip
        quantized = quantize(weight, bits)
        matrix = self._prepare(weight if quantized is None else quantized.restored().to(weight.dtype))
        self._shapes.setdefault(matrix.shape, matrix)
        return TorchLinear(self, matrix, bias, gate)

    def mixture(
        self, gate_ups: Iterable[torch.Tensor], downs: Iterable[torch.Tensor], gate: Gate, routing: Routing, bits: Bits
    ) -> None:
        return None

    def norm_weight(self, weight: torch.Tensor) -> torch.Tensor:
        return weight

    def attention(self, heads: Heads, norms: Norms) -> TorchAttention:
        return TorchAttention(self, heads, norms)

    def stack(self, layers: Groups[DenseLayer], heads: Heads, norms: Norms) -> None:
        return None

    def settle(self, heads: Heads, block_size: int, agree: Agree) -> None:
        attention = measure_attention(heads.head_dim, tile_tokens(block_size), self.like, self.weigh)
        self.ladders = agree(Ladders(measure_linear(list(self._shapes.values())), attention))

    def pad(self, rows: int) -> int:
        return self.ladders.linear.pad(rows) if rows else 0

    def place(self, arrays: Groups[np.ndarray]) -> list[torch.Tensor]:
        return [torch.tensor(array, device=self.like.device) for array in arrays]

    def norm(self, x: torch.Tensor, weight: torch.Tensor, norms: Norms) -> torch.Tensor:
        return rms_norm(x, weight, norms.eps, norms.wide)

    def add_norm(
        self, hidden: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, norms: Norms
    ) -> tuple[torch.Tensor, torch.Tensor]:
        whole = hidden if added is None else hidden + added
        return whole, self.norm(whole, weight, norms)


@dataclass(frozen=True, slots=True)
class TorchLinear:
    backend: TorchBackend
    matrix: Matrix
    bias: torch.Tensor | None
    gate: Gate | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = linear(x, self.matrix, self.bias, self.backend.ladders.linear)
        return out if self.gate is None else GATES[self.gate](out)


class TorchAttention:
    """Segments (kernels/reference/attention.py); the masks of one step are made once for all groups of a window."""

    def __init__(self, backend: TorchBackend, heads: Heads, norms: Norms) -> None:
        self._backend = backend
        self._heads = heads
        self._norms = norms

    def plan(self, groups: Groups[GroupCalls], block_size: int) -> list[object]:
        made: dict[tuple[int, int | None], Segment] = {}  # by first row and window
        return [tuple(self._segment(call, group.window, block_size, made) for call in group.calls) for group in groups]

    def turns(
        self, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Both at [rows], as apply_rope takes them: [rows, 1, head_dim / 2]."""
        return cos[positions][:, None], sin[positions][:, None]

    def attend(
        self, qkv: torch.Tensor, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, k_cache: torch.Tensor,
        v_cache: torch.Tensor, place: GroupPlace,
    ) -> torch.Tensor:  # fmt: skip
        heads, count = self._heads, len(place.block_ids)
        parts = qkv.view(len(qkv), -1, heads.head_dim)
        q, k, v = parts.split((heads.num_heads, heads.num_kv_heads, heads.num_kv_heads), dim=1)
        if q_norm is not None and k_norm is not None:
            q, k = self._backend.norm(q, q_norm, self._norms), self._backend.norm(k, k_norm, self._norms)
        assert isinstance(place.turns, tuple) and isinstance(place.plan, tuple)
        q, k = (apply_rope(part, *place.turns) for part in (q, k))
        store_kv(k_cache, k[:count], place.block_ids, place.offsets)
        store_kv(v_cache, v[:count], place.block_ids, place.offsets)
        attended = [
            paged_attention(q[one.rows], k_cache, v_cache, one, heads.scale, self._backend.weigh) for one in place.plan
        ]
        padding = q.new_zeros(len(q) - count, *q.shape[1:])
        out = torch.cat((*attended, padding)) if len(attended) > 1 or len(padding) else attended[0]
        return out.flatten(1)

    def _segment(
        self, call: Call, window: int | None, block_size: int, made: dict[tuple[int, int | None], Segment]
    ) -> Segment:  # fmt: skip
        blocks = torch.tensor(call.blocks, device=self._backend.like.device)
        same = made.get((call.rows.start, window))
        if same is not None:
            return replace(same, blocks=blocks)
        segment = make_segment(
            call.rows, list(call.starts), call.num_new, blocks, self._heads.num_heads // self._heads.num_kv_heads,
            block_size, self._backend.ladders.attention, self._backend.query_tile, window,
        )  # fmt: skip
        made[(call.rows.start, window)] = segment
        return segment
