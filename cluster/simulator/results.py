"""What a simulation found: of each request how it fared, of each worker what it did over time."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.simulator.gaps import Gaps


@dataclass(frozen=True, slots=True)
class RequestResult:
    """As the client saw it; times in seconds. `error` is the code of what ended it early, else empty."""

    request_id: str
    arrived_s: float
    num_prompt: int
    num_wanted: int  # output tokens asked for
    num_output: int  # that came
    cached_tokens: int
    ttft_s: float | None  # arrival to first token
    gap_s: float | None  # first token to second: the hand-off's
    ended_s: float
    error: str = ""

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first."""
        if self.ttft_s is None or self.num_output < 2:
            return None
        return (self.ended_s - self.arrived_s - self.ttft_s) / (self.num_output - 1)


@dataclass(frozen=True, slots=True)
class WorkerSample:
    """One worker at one time."""

    at_s: float
    worker_id: str
    role: str
    num_running: int
    num_queued: int  # submissions in the prefill queue and sequences that wait in the engine
    num_blocks: int
    num_free_blocks: int
    num_held_blocks: int  # of hand-offs and reservations


@dataclass(frozen=True, slots=True)
class Happening:
    """A change of the cluster under way: a worker came, left, died, or changed its role."""

    at_s: float
    worker_id: str
    what: str


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """`num_extrapolated` of `num_steps` steps were beyond what the service times were measured for. `digest`: of the
    event log. `gaps`: between the tokens of all requests, as they came. `num_events`: callbacks that it took.
    `num_computed`: positions of prompts, or of what was computed like one, that were computed for the first time;
    `recomputed`: how many were computed again, by why what was there had been lost (recomputation.py)."""

    requests: tuple[RequestResult, ...]
    samples: tuple[WorkerSample, ...]
    happenings: tuple[Happening, ...]
    span_s: float  # virtual time from the first arrival to the end of the last request
    num_steps: int
    num_extrapolated: int
    digest: str
    gaps: Gaps = field(default_factory=Gaps, compare=False)
    num_events: int = field(default=0, compare=False)
    num_computed: int = 0
    recomputed: tuple[tuple[str, int], ...] = ()
