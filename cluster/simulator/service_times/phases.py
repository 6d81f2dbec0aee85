"""Service times from one model of prefill and one of decode: how steps that do both take as long as they do.

1. a step of one kind takes what its own model says, exactly;
2. a mixed step takes overhead + max(memory time, compute time). Reading the weights is in decode's time, and is not
   paid again for the chunks beside it. Overhead is the lower of both models' intercepts; what decode's intercept has
   above that is the reading of weights;
3. memory: what decode takes above the overhead, and reading what the chunks' tokens see; compute: what prefill takes
   above the overhead, and the pending tokens, each as a prompt's token. So a mixed step is never faster than either
   part of it alone, and becomes a pure one as the other part shrinks;
4. a chunk after stored positions takes at least the time to read these and the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.simulator.service_times.model import contexts_of
from engine.step_shape import Chunk, StepShape


class PrefillTimes(Protocol):
    """Of steps that only compute chunks, at least one."""

    @property
    def fixed_s(self) -> float:
        """What remains for a prompt of no tokens."""
        ...

    @property
    def token_s(self) -> float:
        """Of one more token in a short prompt."""
        ...

    def chunks_s(self, chunks: Sequence[Chunk]) -> float: ...

    def extrapolates(self, chunks: Sequence[Chunk]) -> bool: ...


class DecodeTimes(Protocol):
    """Of steps that only decode, at least one sequence."""

    @property
    def fixed_s(self) -> float:
        """What remains for no sequences."""
        ...

    @property
    def context_token_s(self) -> float:
        """Of one more position to read."""
        ...

    def decode_s(self, num_decoding: int, num_context: int) -> float: ...

    def decode_each_s(self, num_decoding: int, contexts: range) -> list[float]:
        """`decode_s` of each context, bit for bit."""
        ...

    def extrapolates(self, num_decoding: int, num_context: int) -> bool: ...


@dataclass(frozen=True, slots=True)
class PhaseTimes:
    """Implements service_times.model.ServiceTimes."""

    prefill: PrefillTimes
    decode: DecodeTimes

    def step_s(self, shape: StepShape) -> float:
        if not shape.chunks:
            return self.decode.decode_s(shape.num_decoding, shape.num_context)
        prefill_s = self.prefill.chunks_s(shape.chunks)
        before_s = self.decode.context_token_s * sum(chunk.num_before for chunk in shape.chunks)
        if not shape.num_decoding:
            return max(prefill_s, self.decode.fixed_s + before_s) if before_s else prefill_s
        overhead_s = min(self.prefill.fixed_s, self.decode.fixed_s)
        decoding_s = self.decode.decode_s(shape.num_decoding, shape.num_context) - overhead_s
        pending_s = min(self.prefill.token_s * shape.num_decoding, decoding_s)
        return overhead_s + max(decoding_s + before_s, prefill_s - overhead_s + pending_s)

    def decode_steps_s(self, num_decoding: int, num_context: int, num_steps: int) -> list[float]:
        return self.decode.decode_each_s(num_decoding, contexts_of(num_decoding, num_context, num_steps))

    def extrapolates(self, shape: StepShape) -> bool:
        if shape.chunks and self.prefill.extrapolates(shape.chunks):
            return True
        return bool(shape.num_decoding) and self.decode.extrapolates(shape.num_decoding, shape.num_context)
