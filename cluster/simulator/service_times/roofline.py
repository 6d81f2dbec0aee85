"""Service times by the two limits of a device: overhead + max(time to read memory, time to compute).

Linear in the shape but for attention's pairs of positions, and without end: nothing is beyond it. The defaults are
round numbers of the order of an 8-billion-parameter model in bfloat16 on one large GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.simulator.service_times.model import contexts_of
from engine.step_shape import StepShape


@dataclass(frozen=True, slots=True)
class Roofline:
    """Implements service_times.model.ServiceTimes."""

    overhead_s: float = 1e-3
    weights_s: float = 5e-3  # to read all weights once
    context_token_s: float = 4e-8  # to read one stored position
    prefill_token_s: float = 5e-5  # to compute one position of a prompt
    decode_sequence_s: float = 5e-5  # to compute one pending token
    pair_s: float = 0.0  # to compute attention of one position to one that it sees

    def step_s(self, shape: StepShape) -> float:
        if not shape.chunks:
            return self.decode_s(shape.num_decoding, shape.num_context)
        memory_s = self.weights_s + self.context_token_s * num_read(shape)
        compute_s = self.prefill_token_s * shape.num_chunk_tokens + self.decode_sequence_s * shape.num_decoding
        return self.overhead_s + max(memory_s, compute_s + self.pair_s * num_pairs(shape))

    def decode_steps_s(self, num_decoding: int, num_context: int, num_steps: int) -> list[float]:
        return [self.decode_s(num_decoding, context) for context in contexts_of(num_decoding, num_context, num_steps)]

    def extrapolates(self, shape: StepShape) -> bool:
        return False

    def decode_s(self, num_decoding: int, num_context: int) -> float:
        memory_s = self.weights_s + self.context_token_s * num_context
        compute_s = self.decode_sequence_s * num_decoding + self.pair_s * num_context
        return self.overhead_s + (memory_s if memory_s > compute_s else compute_s)


def num_read(shape: StepShape) -> int:
    """Stored positions that a step reads."""
    return shape.num_context + sum(chunk.num_before + chunk.num_new for chunk in shape.chunks)


def num_pairs(shape: StepShape) -> float:
    """Pairs of a position that a step computes and one that it sees: half of a prompt's square."""
    return shape.num_context + sum(chunk.num_new * (chunk.num_before + chunk.num_new / 2) for chunk in shape.chunks)
