"""The pace of an engine: how long its steps take, learnt from those that it has computed. Pure; in seconds.

1. `learn` takes a measured step: one that only decodes tells what sequences and their contexts cost, one with chunks
   what these add to it;
2. `step_s` predicts a step, `prefill_s` a prompt, `chunk_within` turns it round: what may be added to a step in a time.
Steps with chunks are trusted to predict up to twice as many tokens as the largest of them had.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from engine.least_squares import LeastSquares
from engine.step_shape import Chunk, StepRecord, StepShape

NEWEST = 0.2  # weight of a step against those before
OUTLIER = 3.0  # times as long as predicted: more is not believed at once
MIN_LEARNT = 4  # steps, before a model is asked
TRUST = 2  # times the largest chunks that were measured


class Pace:
    def __init__(self) -> None:
        self._recent_s, self._recent_tokens = 0.0, 0.0  # of steps with chunks, the newest counting most
        self._decode = LeastSquares(3)  # 1, sequences by 16, positions by 4000
        self._chunks = LeastSquares(2)  # hundreds of tokens, ten thousands of pairs (position, one that it sees)
        self._largest = 0

    def learn_all(self, records: Iterable[StepRecord]) -> None:
        for record in records:
            self.learn(record)

    def learn(self, record: StepRecord) -> None:
        shape, step_s = record.shape, record.step_s
        if step_s <= 0.0:
            return
        if not shape.chunks:
            step_s = self._believed(self._decode, step_s, self.decode_s(shape.num_decoding, shape.num_context))
            self._decode.learn(_decode_features(shape.num_decoding, shape.num_context), step_s, step_s)
            return
        num_tokens = shape.num_chunk_tokens
        self._recent_s = (1 - NEWEST) * self._recent_s + step_s
        self._recent_tokens = (1 - NEWEST) * self._recent_tokens + num_tokens
        if shape.num_decoding and self._decode.num_learnt < MIN_LEARNT:
            return  # which part of it was the chunks' is not known
        step_s = self._believed(self._chunks, step_s, self._predict(shape))
        self._chunks.learn(_chunk_features(shape), max(0.0, step_s - self._beside_s(shape)), step_s)
        self._largest = max(self._largest, num_tokens)

    # --- predictions -----------------------------------------------------------------------------------------

    @property
    def token_s(self) -> float | None:
        """Of a prompt's token of late, with all that was computed beside it; None before there was any."""
        return self._recent_s / self._recent_tokens if self._recent_tokens else None

    def decode_s(self, num_decoding: int, num_context: int) -> float | None:
        """Of a step that only decodes; None as long as that is not known."""
        if self._decode.num_learnt < MIN_LEARNT:
            return None
        return max(0.0, self._decode.predict(_decode_features(num_decoding, num_context)))

    def step_s(self, shape: StepShape) -> float | None:
        """None as long as that is not known, or of far larger chunks than were ever measured."""
        if not shape.chunks:
            return self.decode_s(shape.num_decoding, shape.num_context)
        if self._chunks.num_learnt < MIN_LEARNT or shape.num_chunk_tokens > TRUST * self._largest:
            return None
        return self._predict(shape)

    def prefill_s(self, num_new: int, num_cached: int, chunk: int) -> float | None:
        """Of a prompt's `num_new` positions after `num_cached`, in steps of at most `chunk`, with nothing beside it."""
        if self.token_s is None:
            return None
        if self._chunks.num_learnt < MIN_LEARNT:
            return num_new * self.token_s
        num_steps = max(1, math.ceil(num_new / chunk))
        whole = StepShape((Chunk(num_cached, num_new),))  # pairs and tokens of all steps are those of one
        return num_steps * self._beside_s(whole) + max(0.0, self._chunks.predict(_chunk_features(whole)))

    def chunk_within(self, limit_s: float, num_decoding: int, num_context: int, num_before: int, most: int) -> int:
        """How many tokens of a prompt, after `num_before` of it, a step can take that is to last `limit_s`; `most` at
        most. 0 also where nothing is known: then a chunk has to be tried."""
        alone_s = self.decode_s(num_decoding, num_context)
        most = min(most, TRUST * self._largest)
        if alone_s is None or most <= 0 or not alone_s < limit_s:
            return 0
        per_token_s, per_pair_s = (max(0.0, one) for one in self._chunks.coefficients)
        per_token_s, per_pair_s = per_token_s / 1e2, per_pair_s / 1e4
        linear_s = per_token_s + per_pair_s * num_before
        room_s = limit_s - alone_s
        if linear_s * most + per_pair_s * most * most / 2 <= room_s:
            return most
        # per_pair_s / 2 * n**2 + linear_s * n = room_s
        return int(2 * room_s / (linear_s + math.sqrt(linear_s**2 + 2 * per_pair_s * room_s)))

    # --- parts -----------------------------------------------------------------------------------------------

    def _beside_s(self, shape: StepShape) -> float:
        """What the step would take without its chunks."""
        return self.decode_s(shape.num_decoding, shape.num_context) or 0.0

    def _predict(self, shape: StepShape) -> float:
        return self._beside_s(shape) + max(0.0, self._chunks.predict(_chunk_features(shape)))

    def _believed(self, model: LeastSquares, step_s: float, predicted_s: float | None) -> float:
        if model.num_learnt < MIN_LEARNT or not predicted_s:
            return step_s
        return min(step_s, OUTLIER * predicted_s)


def _decode_features(num_decoding: int, num_context: int) -> tuple[float, float, float]:
    return 1.0, num_decoding / 16, num_context / 4e3


def _chunk_features(shape: StepShape) -> tuple[float, float]:
    num_pairs = sum(chunk.num_new * (chunk.num_before + chunk.num_new / 2) for chunk in shape.chunks)
    return shape.num_chunk_tokens / 1e2, num_pairs / 1e4
