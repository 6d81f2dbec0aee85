"""What a policy decides by, and what it says: a frozen snapshot of one moment in, a decision out.

All of it is the gateway's own knowledge: its live requests, what workers reported last, predictions. Times are of the
running loop's clock, in seconds. Nothing here waits, or knows a clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Protocol

from engine.step_shape import StepShape
from engine.types import EngineStats, Role, Service
from router.membership import Member, Pool
from router.policies.occupancy import NO_DECODES, NO_PROMPTS, Decodes, Prompts

Name = tuple[str, str]  # one life of a worker: its id and its incarnation


def has_targets(service: Service) -> bool:
    return math.isfinite(service.ttft_s) or math.isfinite(service.tpot_s)


class Predictor(Protocol):
    """Durations in seconds, by what workers of a pool were measured to need. Pure."""

    def step_s(self, pool: Pool, shape: StepShape) -> float: ...

    def prefill_s(self, pool: Pool, num_new: int, num_cached: int, chunk: int) -> float:
        """Of a prompt's `num_new` positions after `num_cached` in steps of at most `chunk`, with nothing beside it."""
        ...

    def decode_step_s(self, pool: Pool, num_sequences: int, num_context: int) -> float: ...

    def transfer_s(self, source: str, target: str, size_bytes: int) -> float:
        """Between two workers, by their ids."""
        ...


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Of every worker's engine: see engine.config."""

    block_size: int = 16
    prefill_chunk: int = 256
    max_batch_tokens: int = 512
    max_batch_seqs: int = 64


DEFAULT_LIMITS = EngineLimits()


@dataclass(frozen=True, slots=True)
class Margin:
    """How far times may be beyond their predictions, as it was measured: the lesser of times `factor` and plus
    `added_s` counts for a first token, `step_factor` for steps."""

    factor: float = 1.0
    added_s: float = math.inf
    step_factor: float = 1.0

    def ttft_s(self, predicted_s: float) -> float:
        return min(predicted_s * self.factor, predicted_s + self.added_s)


@dataclass(frozen=True, slots=True)
class Ask:
    """What is to be placed. `ttft_s`: until its first token is due. `num_output`: the most that is still to be
    generated, `expected_output`: what is likely. `cached`: positions of its beginning that workers have.
    `refused_by`: who has just had no room for it."""

    num_tokens: int  # known ones: prompt and what was generated before
    num_output: int
    expected_output: float
    ttft_s: float = math.inf
    tpot_s: float = math.inf
    priority: int = 0
    num_answers: int = 1
    hand_off: bool = True  # False: what cannot be moved is computed where it is needed
    cached: Mapping[Name, int] = field(default_factory=dict)
    refused_by: Name | None = None
    is_prompt_only: bool = False  # nothing is generated

    @property
    def has_targets(self) -> bool:
        return math.isfinite(self.ttft_s) or math.isfinite(self.tpot_s)


@dataclass(slots=True)
class WorkerLoad:
    """What the router knows of a worker now: its own placements there, and the worker's last report. Nobody
    changes one. It is not frozen: to make a frozen one takes five times as long, and one is made for every report."""

    member: Member
    connected: bool  # and its pool routes to it
    num_sequences: int  # live requests placed here
    num_prompt_tokens: int  # of those still without a first token
    stats: EngineStats
    prompts: Prompts = NO_PROMPTS  # these, as predicted
    decodes: Decodes = NO_DECODES  # those that decode here, or will

    @property
    def name(self) -> Name:
        return self.member.name


@dataclass(frozen=True, slots=True)
class Return:
    """A refused client that was told to come back then, with a prompt that takes so long."""

    at: float
    compute_s: float


@dataclass(frozen=True, slots=True)
class Memory:
    """What policies remember from one decision to the next."""

    turn: int = 0  # placements so far
    mean_prompt: float = 0.0  # tokens, of late
    short_batch: Name | None = None  # who got the last short prompt
    returns: tuple[Return, ...] = ()


@dataclass(frozen=True, slots=True)
class Snapshot:
    now: float
    loads: Sequence[WorkerLoad]
    ask: Ask
    predictor: Predictor
    limits: EngineLimits = DEFAULT_LIMITS
    margin: Margin = Margin()
    memory: Memory = Memory()
    promised_of_late: bool = False  # have there been requests with targets?

    def pool(self, role: Role) -> list[WorkerLoad]:
        """Those of a role that can be reached."""
        return [load for load in self.loads if load.connected and load.member.role is role]

    def cached_on(self, load: WorkerLoad) -> int:
        """Positions of the prompt's beginning there; the last position is always computed."""
        return min(self.ask.cached.get(load.name, 0), self.ask.num_tokens - 1) if self.ask.cached else 0

    def cached_on_each(self, names: Sequence[Name]) -> list[int]:
        """The same of many workers."""
        cached, most = self.ask.cached, self.ask.num_tokens - 1
        counts = list(map(cached.get, names, repeat(0))) if cached else [0] * len(names)
        return [min(count, most) for count in counts] if max(counts, default=0) > most else counts

    def prefill_s(self, load: WorkerLoad) -> float:
        cached = self.cached_on(load)
        chunk = self.limits.prefill_chunk
        return self.predictor.prefill_s(load.member.pool, self.ask.num_tokens - cached, cached, chunk)


# --- decisions ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Placement:
    """`first` computes the prompt; `decode` goes on, or None when `first` does it all. `ttft_s`: until its first token
    as predicted, and `own_s` what of that its prompt takes, where the policy predicts."""

    first: Member
    decode: Member | None
    ttft_s: float | None = None
    own_s: float | None = None


@dataclass(frozen=True, slots=True)
class Wait:
    """Not now: decide again when there is news, `until_s` from now at the latest; then it is refused, if it has
    targets."""

    reason: str
    until_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Refuse:
    """Its targets cannot be met. `retry_after_s`: when they could."""

    reason: str
    retry_after_s: float


Decision = Placement | Wait | Refuse


class Policy(Protocol):
    """Pure. None: nobody can be reached."""

    def __call__(self, snapshot: Snapshot) -> Decision | None: ...
