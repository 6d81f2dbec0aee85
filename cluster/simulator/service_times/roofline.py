"""Service times by the two limits of a device: overhead + max(time to read memory, time to compute).

Linear in the shape, without end: nothing is beyond it. The defaults are round numbers of the order of an
8-billion-parameter model in bfloat16 on one large GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.step_shape import StepShape


@dataclass(frozen=True, slots=True)
class Roofline:
    """Implements service_times.model.ServiceTimes."""

    overhead_s: float = 1e-3
    weights_s: float = 5e-3  # to read all weights once
    context_token_s: float = 4e-8  # to read one stored position
    prefill_token_s: float = 5e-5  # to compute one position of a prompt
    decode_sequence_s: float = 5e-5  # to compute one pending token

    def step_s(self, shape: StepShape) -> float:
        num_read = shape.num_context + sum(chunk.num_before + chunk.num_new for chunk in shape.chunks)
        memory_s = self.weights_s + self.context_token_s * num_read
        compute_s = self.prefill_token_s * shape.num_chunk_tokens + self.decode_sequence_s * shape.num_decoding
        return self.overhead_s + max(memory_s, compute_s)

    def extrapolates(self, shape: StepShape) -> bool:
        return False
