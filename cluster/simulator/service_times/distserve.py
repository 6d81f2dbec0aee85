"""DistServe's closed forms (Zhong et al., OSDI 2024, appendix A), with the coefficients of its repository's profiles.

prefill = a + b sum(n) + c sum(n^2) over the prompts of a step; decode = a + b sum(context) + c batch, with one set of
coefficients below a batch size and one from it on. The simulator of that repository adds a constant millisecond per
pipeline stage to prefill (simdistserve/estimators/time_estimator.py, marked there as to be done); it is not part of the
fit and is left out here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.step_shape import Chunk

Coefficients = tuple[float, float, float]  # seconds


@dataclass(frozen=True, slots=True)
class DistServePrefill:
    """Implements service_times.phases.PrefillTimes. Of a chunk after m stored tokens the square is that of the
    whole less that of m: the attention that is computed now."""

    coefficients: Coefficients

    @property
    def fixed_s(self) -> float:
        return self.coefficients[0]

    @property
    def token_s(self) -> float:
        return self.coefficients[1]

    def chunks_s(self, chunks: Sequence[Chunk]) -> float:
        constant, linear, square = self.coefficients
        num_new = sum(chunk.num_new for chunk in chunks)
        squares = sum(chunk.num_new * (chunk.num_new + 2 * chunk.num_before) for chunk in chunks)
        return constant + linear * num_new + square * squares

    def extrapolates(self, chunks: Sequence[Chunk]) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class DistServeDecode:
    """Implements service_times.phases.DecodeTimes. `large` is for batches of at least `threshold` sequences."""

    small: Coefficients
    large: Coefficients
    threshold: int

    @property
    def fixed_s(self) -> float:
        return self.small[0]

    @property
    def context_token_s(self) -> float:
        return self.small[1]

    def decode_s(self, num_decoding: int, num_context: int) -> float:
        constant, context, sequence = self.small if num_decoding < self.threshold else self.large
        return constant + context * num_context + sequence * num_decoding

    def decode_each_s(self, num_decoding: int, contexts: range) -> list[float]:
        return [self.decode_s(num_decoding, context) for context in contexts]

    def extrapolates(self, num_decoding: int, num_context: int) -> bool:
        return False
