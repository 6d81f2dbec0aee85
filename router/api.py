"""The seam between the HTTP face and the owner of live requests: token ids in, token outputs out.

`router/dispatch.py` implements Generator over workers; tests of the face use a small real fake.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Protocol

from engine.types import NO_TRANSFERS, Request, TokenOutput, TransferReport
from router.prediction_error import PredictionError


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker as /health and `steelyard status` show it."""

    worker_id: str
    incarnation: str
    role: str
    address: str
    connected: bool
    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    num_leaked_blocks: int
    prefix_queries: int = 0  # prompt tokens looked up in the prefix cache
    prefix_hits: int = 0
    host_blocks: int = 0  # in the host tier
    host_queries: int = 0  # blocks looked up there
    host_hits: int = 0
    kv_token_bytes: int = 0
    transfers: TransferReport = NO_TRANSFERS


@dataclass(frozen=True, slots=True)
class ControlView:
    """The controller's word on itself, as the gateways were told last. `attained`: the share of requests that is
    predicted to keep its targets with the split as it is, and `best_attained` with the best one; `forecast_error`: of
    the rate, relative, by the `forecast_model` that is believed."""

    mode: str
    reason: str  # of the last decision
    num_flips: int = 0
    num_undone: int = 0  # flips that failed
    last_flip_s: float | None = None  # from its decision until the worker was listed
    num_prefill: int | None = None
    best_prefill: int | None = None
    attained: float | None = None
    best_attained: float | None = None
    forecast_model: str = ""
    forecast_error: float = 0.0
    num_added: int = 0  # workers that were had come
    num_removed: int = 0
    num_coming: int = 0  # workers that are not there yet, or not there again
    is_together: bool = False  # every worker serves both phases, and none is missing: there is no hand-off to be proved


@dataclass(frozen=True, slots=True)
class HealthView:
    """Healthy means: a canary went through prefill, wire and decode within the last `canary_s`. `retries`: how often
    requests were placed again, by the code of the error that ended the placement before; `migrations`: how often one
    was to move to another worker while it generated, by what came of it ("moved", an error's code, "in doubt");
    `control`: of who keeps the ratio of the pools, if somebody does;
    `prediction`: how far off predicted times were, by what they were of; `admissions`: decisions on requests, as
    (outcome, reason, count); `num_waiting`: those that wait here for room."""

    healthy: bool
    reason: str
    canary_age_s: float | None
    membership_version: int
    workers: tuple[WorkerView, ...]
    num_live_requests: int
    retries: tuple[tuple[str, int], ...] = ()
    migrations: tuple[tuple[str, int], ...] = ()
    prediction: tuple[PredictionError, ...] = ()
    admissions: tuple[tuple[str, str, int], ...] = ()
    num_waiting: int = 0
    gateway_id: str = ""  # of the gateway that says so
    control: ControlView | None = None


class Generator(Protocol):
    """Owns live requests. Errors are SteelyardError, raised from the iterator (before or between outputs)."""

    def generate(self, request: Request, *siblings: Request) -> AsyncGenerator[TokenOutput]:
        """Yield outputs with contiguous indices; the last one has `finish`. aclose() aborts the request.

        `siblings` are other answers to its prompt: their outputs come as they are made, told apart by their key."""
        ...

    def cancel(self, request_id: str) -> None:
        """End one of several answers; its last output says ABORT. An unknown id is no error."""
        ...

    def tap(self, request_id: str, take: Callable[[TokenOutput], bool]) -> None:
        """While the iterator's reader waits, offer outputs to `take` as they come, but the last; what it says False to,
        the iterator yields. Only for one answer alone; an unknown id is no error. `take` must not raise."""
        ...

    def new_request_id(self) -> str: ...

    def new_seed(self) -> int: ...

    def health(self) -> HealthView: ...
