"""The profile of a live worker: what was measured of it, as a YAML file.

Steps are told by their shape, as medians. What a request spends outside of queues, steps and the transfer of its KV is
told as a duration before its first token and one for each token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import yaml
from pydantic import Field, model_validator

from cluster.config import read_yaml, validated
from engine.config import StrictModel
from engine.errors import ConfigError
from engine.step_shape import Chunk, StepRecord, StepShape

VERSION = 1
CONTEXT_STEP = 1.1  # from one size of contexts to the next


class ProfiledStep(StrictModel):
    """Steps of about one shape: the median of their durations, and how many there were."""

    chunks: list[Annotated[list[int], Field(min_length=2, max_length=2)]] = Field(
        default=[], description="[tokens before, new tokens] of each chunk"
    )
    num_decoding: int = Field(default=0, ge=0)
    num_context: int = Field(default=0, ge=0, description="positions that these read together")
    step_ms: float = Field(gt=0)
    count: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _is_a_step(self) -> ProfiledStep:
        if any(before < 0 or new < 1 for before, new in self.chunks):
            raise ValueError("a chunk has at least 0 tokens before it and at least 1 new one")
        if self.num_context < self.num_decoding:
            raise ValueError("each decoding sequence reads at least its own position: num_context >= num_decoding")
        if not (self.chunks or self.num_decoding):
            raise ValueError("a step computes something: chunks or num_decoding")
        return self

    @property
    def shape(self) -> StepShape:
        return StepShape(tuple(Chunk(*chunk) for chunk in self.chunks), self.num_decoding, self.num_context)

    @property
    def record(self) -> StepRecord:
        return StepRecord(self.shape, self.step_ms / 1e3)


class ProfiledLink(StrictModel):
    """Between two workers."""

    latency_ms: float = Field(ge=0)
    gb_per_s: float = Field(gt=0, description="10^9 bytes per second")


class ProfiledSlowdown(StrictModel):
    """How many times as long steps take while the other worker, on the same host, computes."""

    prefill: float = Field(default=1.0, ge=1, description="of steps with chunks of prompts")
    decode: float = Field(default=1.0, ge=1, description="of those that only decode")


class WorkerProfile(StrictModel):
    version: Literal[1] = VERSION
    model: str = Field(min_length=1)
    device: str = Field(min_length=1, description="what it was measured on, in words")
    gateway_ms: float = Field(
        ge=0, description="of a request, outside of queues, steps and transfer, to its first token"
    )
    token_ms: float = Field(ge=0, description="of each token, outside of its step")
    link: ProfiledLink
    kv_token_bytes: int | None = Field(default=None, ge=1, description="KV of one token, which a hand-off moves")
    slowdown: ProfiledSlowdown = ProfiledSlowdown()
    steps: list[ProfiledStep] = Field(min_length=1)


def read_profile(path: Path) -> WorkerProfile:
    """Raises ConfigError with a line per fault, which names the file and the key."""
    return validated(WorkerProfile, read_yaml(path), f"{path}: ")


def write_profile(profile: WorkerProfile, path: Path) -> None:
    """Replaces what was there. Raises ConfigError where the file cannot be written."""
    text = yaml.safe_dump(profile.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=120)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error


def profiled_steps(records: Iterable[StepRecord]) -> list[ProfiledStep]:
    """What was measured, by shape. Decode contexts are sorted into sizes a tenth apart, each told by its median."""
    found: dict[tuple[tuple[Chunk, ...], int, int], list[StepRecord]] = {}
    for record in records:
        shape = record.shape
        size = round(math.log(max(1, shape.num_context), CONTEXT_STEP))
        found.setdefault((shape.chunks, shape.num_decoding, size), []).append(record)
    return [
        ProfiledStep(
            chunks=[[chunk.num_before, chunk.num_new] for chunk in chunks],
            num_decoding=num_decoding,
            num_context=round(median(record.shape.num_context for record in alike)),
            step_ms=median(record.step_s for record in alike) * 1e3,
            count=len(alike),
        )
        for (chunks, num_decoding, _), alike in found.items()
    ]  # fmt: skip
