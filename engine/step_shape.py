"""Step shapes: how much work a step is, whatever sequences it is for. What a step's duration depends on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a prompt: `num_new` positions after `num_before` that are stored (earlier chunks, or cached)."""

    num_before: int
    num_new: int


@dataclass(frozen=True, slots=True)
class StepShape:
    """`num_decoding` sequences with one pending token each, which read `num_context` positions together, their own
    included; and chunks of prompts beside them."""

    chunks: tuple[Chunk, ...] = ()
    num_decoding: int = 0
    num_context: int = 0

    @property
    def num_chunk_tokens(self) -> int:
        return sum(chunk.num_new for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A step that was computed. `step_s`: to its sampled tokens from those of the step before, or, where the engine was
    idle, from the command that ended that. So steps that follow each other add up to the time that has passed, which is
    the pace of a stream, and no step is charged for waiting."""

    shape: StepShape
    step_s: float


def decode_shape(contexts: Sequence[int]) -> StepShape:
    """Of a step that only decodes: for each sequence the positions that it reads."""
    return StepShape((), len(contexts), sum(contexts))
