"""The backend of CUDA devices: Triton's kernels around cuBLAS's products, or around our own where rows must not depend
on how many there are.

It never waits for the device: a step's numbers go there in one copy from pinned memory, and nothing is read back. Under
Triton's interpreter it computes on a processor, thousands of times slower, for tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Groups
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
import triton

from kernels.backend import Agree, Call, DenseLayer, Gate, GroupCalls, GroupPlace, Heads, Norms, Routing, Turns
from kernels.reference.quantized import Bits, quantize
from kernels.triton import layers, upload
from kernels.triton.attention import Parts, Tasks, Tiling, attend, padded_dim
from kernels.triton.experts import TritonMixture
from kernels.triton.linear import multiply
from kernels.triton.rope import turn_and_store
from kernels.triton.sampling import choose
from kernels.triton.tasks import Cut, TaskNumbers, make_tasks

_INVARIANT_SPLIT = 512  # keys: a part's own bytes are then a hundredth of those that it read
_LEAST_KEYS = 256  # of a part, where parts may be cut anywhere
_PROGRAMS_PER_PROCESSOR = 2
_INTERPRETED_PROGRAMS = 4


@dataclass(frozen=True, slots=True)
class Work:
    """One launch of attention: tasks of one tiling, and how many parts they leave."""

    tiling: Tiling
    tasks: Tasks
    num_parts: int
    part_rows: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What the layers of one group attend to in a step."""

    works: tuple[Work, ...]
    window: int | None


class TritonBackend:
    """Layers on one device."""

    choose = staticmethod(choose)

    def __init__(self, like: torch.Tensor, is_invariant: bool) -> None:
        """like: any tensor of the weights' type and device."""
        self.device = like.device
        self.is_wide = like.dtype == torch.float32
        self.is_invariant = is_invariant
        self.num_programs = _num_programs(like.device)
        self._room: Parts | None = None

    def linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None, gate: Gate | None = None, bits: Bits = 16
    ) -> TritonLinear:  # fmt: skip
        return TritonLinear(_kept(weight, bits).contiguous(), bias, gate, self.is_invariant)

    def mixture(
        self, gate_ups: Iterable[torch.Tensor], downs: Iterable[torch.Tensor], gate: Gate, routing: Routing, bits: Bits
    ) -> TritonMixture:  # fmt: skip
        gate_up, down = (_stacked(weights, routing.num_experts, bits) for weights in (gate_ups, downs))
        return TritonMixture(gate_up, down, gate, routing, self.is_invariant)

    def norm_weight(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.contiguous()

    def attention(self, heads: Heads, norms: Norms) -> TritonAttention:
        return TritonAttention(self, heads, norms)

    def stack(self, layers: Groups[DenseLayer], heads: Heads, norms: Norms) -> None:
        return None

    def settle(self, heads: Heads, block_size: int, agree: Agree) -> None:
        if not self.is_invariant:
            raise ArithmeticError("this backend was made for speed")

    def pad(self, rows: int) -> int:
        return rows

    def place(self, arrays: Groups[np.ndarray]) -> list[torch.Tensor]:
        return upload.place(arrays, self.device)

    def norm(self, x: torch.Tensor, weight: torch.Tensor, norms: Norms) -> torch.Tensor:
        return layers.add_rms_norm(x.contiguous(), None, weight, norms)

    def add_norm(
        self, hidden: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, norms: Norms
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden, layers.add_rms_norm(hidden, added, weight, norms)

    def room(self, num_parts: int, part_rows: int, heads: Heads) -> Parts:
        """For parts of attention: kept from one layer to the next, which follow each other on the stream."""
        shape, dim = (num_parts, heads.num_kv_heads, part_rows), padded_dim(heads.head_dim)
        size = num_parts * heads.num_kv_heads * part_rows
        if self._room is None or self._room.sums.numel() < size * dim:
            like = {"dtype": torch.float32, "device": self.device}
            self._room = Parts(torch.empty(max(1, size) * dim, **like), torch.empty(max(1, size) * 2, **like))
        sums, marks = self._room.sums[: size * dim], self._room.marks[: size * 2]
        return Parts(sums.view(*shape, dim), marks.view(*shape[:2], 2, part_rows))


@dataclass(frozen=True, slots=True)
class TritonLinear:
    weight: torch.Tensor
    bias: torch.Tensor | None
    gate: Gate | None
    is_invariant: bool

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        product = multiply if self.is_invariant else F.linear
        out = product(x, self.weight, self.bias)
        return out if self.gate is None else layers.gate_and_mul(out, self.gate)


class TritonAttention:
    """Implements kernels.backend.Attention."""

    def __init__(self, backend: TritonBackend, heads: Heads, norms: Norms) -> None:
        self._backend = backend
        self._heads = heads
        self._norms = norms
        self.num_groups = heads.num_heads // heads.num_kv_heads
        self.num_programs = max(1, backend.num_programs // heads.num_kv_heads)  # of each KV head

    def plan(self, groups: Groups[GroupCalls], block_size: int) -> list[object]:
        """Sequences with one new token and chunks have tilings of their own, but where bits must not depend on it."""
        numbers = [[self.numbers(calls, one.window, block_size) for calls in self._sorted(one)] for one in groups]
        flat = [array for group in numbers for _, one in group for array in arrays_of(one)]
        placed = iter(self._backend.place(flat))
        return [
            Plan(tuple(self._work(tiling, one, placed) for tiling, one in group), about.window)
            for about, group in zip(groups, numbers, strict=True)
        ]

    def turns(self, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> Turns:
        return Turns(cos, sin, positions)

    def attend(
        self, qkv: torch.Tensor, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, k_cache: torch.Tensor,
        v_cache: torch.Tensor, place: GroupPlace,
    ) -> torch.Tensor:  # fmt: skip
        plan, turns, heads = place.plan, place.turns, self._heads
        assert isinstance(plan, Plan) and isinstance(turns, Turns)
        turn_and_store(
            qkv, q_norm, k_norm, k_cache, v_cache, turns.positions, place.block_ids, place.offsets, turns.cos,
            turns.sin, heads, self._norms,
        )  # fmt: skip
        out = qkv.new_empty(len(qkv), heads.num_heads * heads.head_dim)
        for work in plan.works:
            parts = self._backend.room(work.num_parts, work.part_rows, heads)
            attend(
                qkv, k_cache, v_cache, out, work.tasks, parts, heads, plan.window, work.tiling, self.num_programs
            )  # fmt: skip
        return out

    def numbers(self, calls: Groups[Call], window: int | None, block_size: int) -> tuple[Tiling, TaskNumbers]:
        """Of calls that share a tiling."""
        tiling = self.tiling(max(call.num_new for call in calls))
        return tiling, make_tasks(calls, window, block_size, self.cut(tiling))

    def tiling(self, num_new: int) -> Tiling:
        """For calls of so many new tokens. As large as registers hold (`python -m benchmarks.kernel_code`)."""
        is_big = self._backend.is_wide or padded_dim(self._heads.head_dim) > 128
        least, keys = max(16, triton.next_power_of_2(self.num_groups)), 32 if is_big else 64
        if self._backend.is_invariant:
            return Tiling(max(32 if is_big else 64, least), keys, _INVARIANT_SPLIT, num_warps=8, num_stages=2)
        if num_new == 1:
            return Tiling(least, keys, 0, num_warps=4, num_stages=3)
        return Tiling(max(64 if is_big else 128, least), keys, 0, num_warps=8, num_stages=2 if is_big else 3)

    def cut(self, tiling: Tiling) -> Cut:
        return Cut(tiling.rows // self.num_groups, tiling.keys, tiling.split, _LEAST_KEYS, self.num_programs)

    def _sorted(self, group: GroupCalls) -> list[list[Call]]:
        if self._backend.is_invariant:
            return [list(group.calls)] if group.calls else []
        single = [call for call in group.calls if call.num_new == 1]
        chunks = [call for call in group.calls if call.num_new > 1]
        return [calls for calls in (single, chunks) if calls]

    def _work(self, tiling: Tiling, numbers: TaskNumbers, placed: Iterator[torch.Tensor]) -> Work:
        tasks = Tasks(*(next(placed) for _ in arrays_of(numbers)))
        return Work(tiling, tasks, numbers.num_parts, numbers.part_tokens * self.num_groups)


def arrays_of(numbers: TaskNumbers) -> list[np.ndarray]:
    """In the order of Tasks' fields."""
    return [numbers.tasks, numbers.merges, numbers.counts, numbers.tables]


def _kept(weight: torch.Tensor, bits: Bits) -> torch.Tensor:
    """What so many bits keep of it, in its own type."""
    quantized = quantize(weight, bits)
    return weight if quantized is None else quantized.restored().to(weight.dtype)


def _stacked(weights: Iterable[torch.Tensor], count: int, bits: Bits) -> torch.Tensor:
    """So many of one shape [out, in], of which two are there at a time -> [count, out, in]."""
    stack = None
    for index, weight in enumerate(weights):
        stack = weight.new_empty(count, *weight.shape) if stack is None else stack
        stack[index] = _kept(weight, bits)
    assert stack is not None, "no expert"
    return stack


def _num_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count * _PROGRAMS_PER_PROCESSOR
