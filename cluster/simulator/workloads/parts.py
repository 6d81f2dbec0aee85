"""Parts: the kinds of workload that a YAML file or a short text can describe (pydantic: from outside).

The keys are the same in both forms, and have their units in their names. `synthesis` makes requests of them.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from cluster.simulator.workloads.lengths import Constant, Moving, Uniform, parse_lengths
from cluster.simulator.workloads.sessions import PIECE_TOKENS
from cluster.simulator.workloads.spread import Spread
from cluster.simulator.workloads.traces import MAX_TOKENS
from engine.config import StrictModel

PerSecond = Annotated[float, Field(ge=0, le=1e6)]
Seconds = Annotated[float, Field(ge=0, le=1e9)]
SomeSeconds = Annotated[float, Field(gt=0, le=1e9)]
LengthText = Annotated[  # written as lengths.GRAMMAR says
    Constant | Uniform | Moving, BeforeValidator(lambda value: parse_lengths(str(value)))
]


class Part(StrictModel):
    """What every kind can be told. It is scaled and capped, sped up, cut, and then shifted to its start."""

    start_s: Seconds = Field(default=0.0, description="when it begins")
    speedup: float = Field(default=1.0, gt=0, le=1e6, description="so many times as many requests per second")
    max_s: SomeSeconds | None = Field(default=None, description="leave out what comes so long after its start")
    requests: int | None = Field(default=None, ge=1, description="leave out all but the first so many")
    prompt_scale: float = Field(default=1.0, gt=0, le=1e3, description="prompts so many times as long")
    output_scale: float = Field(default=1.0, gt=0, le=1e3)
    max_prompt: int = Field(default=MAX_TOKENS, ge=1, description="longer prompts lose their end")
    max_output: int = Field(default=MAX_TOKENS, ge=1)


class TracePart(Part):
    """Recorded requests."""

    path: str = Field(min_length=1, description="from the folder of the YAML file that names it")
    spread: Spread = Field(default=Spread.JITTER, strict=False, description="what to do with times that were rounded")


class SyntheticPart(Part):
    """Requests that share nothing."""

    seconds: SomeSeconds = Field(default=300.0, description="how long they come, before it is sped up")
    rate: PerSecond = Field(description="arrivals per second")
    prompt: LengthText = Constant(1024)
    output: LengthText = Constant(128)
    lengths: str | None = Field(default=None, min_length=1, description="instead: those of this trace's requests")

    @model_validator(mode="after")
    def _lengths_once(self) -> SyntheticPart:
        if self.lengths and {"prompt", "output"} & self.model_fields_set:
            raise ValueError("lengths: stands instead of prompt and output")
        return self


class PoissonPart(SyntheticPart):
    pass


class GammaPart(SyntheticPart):
    cv: float = Field(ge=0.05, le=20, description="deviation of the gaps over their mean; 1 is Poisson")


class WeibullPart(SyntheticPart):
    shape: float = Field(ge=0.1, le=20, description="below 1 bursty, 1 is Poisson, above regular")


class VaryingPart(SyntheticPart):
    """A rate that moves; its gaps are a Gamma distribution's, as far as the rate leaves them alone."""

    cv: float = Field(default=1.0, ge=0.05, le=20, description="1 is Poisson, more is burstier")


class StepPart(VaryingPart):
    to_rate: PerSecond
    at_s: Seconds


class RampPart(VaryingPart):
    to_rate: PerSecond
    begin_s: Seconds = 0.0
    end_s: Seconds

    @model_validator(mode="after")
    def _in_order(self) -> RampPart:
        if self.end_s < self.begin_s:
            raise ValueError(f"end_s: must not come before begin_s ({self.begin_s:g}), got {self.end_s:g}")
        return self


class SinePart(VaryingPart):
    amplitude: float = Field(ge=0, le=1, description="part of the rate by which it swings")
    period_s: SomeSeconds


class SquarePart(VaryingPart):
    to_rate: PerSecond
    period_s: SomeSeconds
    duty: float = Field(default=0.5, ge=0, le=1, description="part of the period in which the rate is `rate`")


class SessionsPart(Part):
    """Talks of several turns, each of which repeats what was said before."""

    seconds: SomeSeconds = Field(default=300.0, description="how long sessions begin")
    rate: PerSecond = Field(description="sessions that begin per second")
    turns: LengthText = Constant(4)
    system: int = Field(default=0, ge=0, le=MAX_TOKENS, multiple_of=PIECE_TOKENS, description="tokens all begin with")
    prompt: LengthText = Field(default=Constant(256), description="new tokens of each turn")
    output: LengthText = Constant(128)
    think_s: Seconds = Field(default=10.0, description="mean time from an answer to the next turn")
    ttft_s: Seconds = Field(default=0.5, description="an answer is expected after this")
    tpot_s: Seconds = Field(default=0.03, description="and this per token")


KINDS: dict[str, type[Part]] = {
    "poisson": PoissonPart,
    "gamma": GammaPart,
    "weibull": WeibullPart,
    "step": StepPart,
    "ramp": RampPart,
    "sine": SinePart,
    "square": SquarePart,
    "sessions": SessionsPart,
    "trace": TracePart,
}
