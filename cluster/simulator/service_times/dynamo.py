"""Service times as Dynamo's mocker computes them from its table, for comparisons with its replay.

What it does (ai-dynamo/dynamo, lib/mocker/src/common/perf_model.rs and lib/mocker/src/scheduler/vllm/core.rs, 2026):
1. prefill is linear in prefill_isl, at the number of chunks x (mean of tokens so far, this chunk's included, less mean
   of tokens before), means rounded down: what is cached or was computed earlier costs nothing;
2. decode is bilinear in (active KV tokens, mean context rounded down), and at least 1 ms. Active tokens are the blocks
   in use times their size; here they are the positions read, so half a block per sequence fewer, and a block that
   several sequences share counts for each;
3. beyond the table the outermost cell's straight lines go on; prefill is at least 0;
4. a step with both takes the sum.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.simulator.service_times.model import contexts_of
from engine.step_shape import Chunk, StepShape

MIN_DECODE_S = 1e-3


@dataclass(frozen=True, slots=True)
class DynamoTimes:
    """Implements service_times.model.ServiceTimes. Axes rise strictly and have at least two points; decode_s is
    [active KV tokens, context]."""

    prefill_tokens: list[float]
    prefill_s: list[float]
    active_tokens: list[float]
    contexts: list[float]
    decode_s: list[list[float]]

    def step_s(self, shape: StepShape) -> float:
        chunks_s = self._chunks_s(shape.chunks) if shape.chunks else 0.0
        return chunks_s + (self._decode_s(shape.num_decoding, shape.num_context) if shape.num_decoding else 0.0)

    def decode_steps_s(self, num_decoding: int, num_context: int, num_steps: int) -> list[float]:
        return [self._decode_s(num_decoding, context) for context in contexts_of(num_decoding, num_context, num_steps)]

    def extrapolates(self, shape: StepShape) -> bool:
        if shape.chunks and not _is_inside(self.prefill_tokens, _num_tokens(shape.chunks)):
            return True
        if not shape.num_decoding:
            return False
        mean = shape.num_context // shape.num_decoding
        return not (_is_inside(self.active_tokens, shape.num_context) and _is_inside(self.contexts, mean))

    def _chunks_s(self, chunks: Sequence[Chunk]) -> float:
        index, part = _cell(self.prefill_tokens, _num_tokens(chunks))
        return max(0.0, _between(self.prefill_s[index], self.prefill_s[index + 1], part))

    def _decode_s(self, num_decoding: int, num_context: int) -> float:
        row, down = _cell(self.active_tokens, num_context)
        column, right = _cell(self.contexts, num_context // num_decoding)
        upper, lower = self.decode_s[row], self.decode_s[row + 1]
        near = _between(upper[column], lower[column], down)
        far = _between(upper[column + 1], lower[column + 1], down)
        return max(MIN_DECODE_S, _between(near, far, right))


def _num_tokens(chunks: Sequence[Chunk]) -> int:
    num_before = sum(chunk.num_before for chunk in chunks)
    num_after = num_before + sum(chunk.num_new for chunk in chunks)
    return len(chunks) * (num_after // len(chunks) - num_before // len(chunks))


def _cell(axis: list[float], at: float) -> tuple[int, float]:
    """The cell's first point, and how far into the cell: below 0 or above 1 beyond the axis."""
    index = min(max(bisect_right(axis, at) - 1, 0), len(axis) - 2)
    return index, (at - axis[index]) / (axis[index + 1] - axis[index])


def _between(first: float, second: float, part: float) -> float:
    return first * (1.0 - part) + second * part


def _is_inside(axis: list[float], at: float) -> bool:
    return axis[0] <= at <= axis[-1]
