"""The stages of one request on one clock: when it came, when its tokens left, and where the time went.

All times are the gateway's loop time; durations of stages are differences of one process's clock each, whoever measured
them. Stages follow each other, so they add up:

    e2e = prepare + route + prefill_queue + prefill + transfer + decode_wait + steps + stalls
          + recovery + migration_pause + unattributed

1. prepare, route: reading and tokenising here; the decision where it runs, and its submission, waits included;
2. prefill_queue, prefill: on the prefill worker, up to the first token;
3. transfer: what of the KV's way to the decode worker was waited for after that (`KvTransfer` tells all of it);
   decode_wait: from its end to the first decode step;
4. steps, stalls: the steps that gave it tokens, and the time between them beyond these (engine/step_account.py);
5. recovery: from the last sign of a placement that failed to the next placing, which has its stages anew;
   migration_pause: how long the stream stood still while it moved;
6. unattributed: the rest. The network, this process, and what a worker that died had not told yet.

TTFT is arrival to first token sent, the hand-off gap first to second token, TPOT (t_last - t_first) / (n - 1) with
n >= 2, the gap included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.types import FinishReason, KvTransfer, TokenOutput

UNATTRIBUTED = "unattributed"


class Ledger:
    """One request's record. Tokens that leave together have the same time. `is_shown`: its client asked for it.
    `on_end` hears of it once, when it has ended."""

    def __init__(
        self, arrival_s: float, *, is_shown: bool = False, on_end: Callable[[Ledger, Outcome], None] | None = None
    ) -> None:
        self.arrival_s = arrival_s
        self.is_shown = is_shown
        self._on_end = on_end
        self.num_tokens = 0
        self.end_s = arrival_s
        self.transfer: KvTransfer | None = None  # the last one
        self._first_s: float | None = None
        self._second_s: float | None = None
        self._last_s = arrival_s
        self._stages: dict[str, float] = {}

    def take(self, output: TokenOutput) -> None:
        """What a worker tells of its part, with the tokens that it made."""
        if output.stages:
            self.add_stages(output.stages)
        self.transfer = output.transfer or self.transfer

    def add_stages(self, stages: tuple[tuple[str, float], ...]) -> None:
        for name, duration_s in stages:
            self._stages[name] = self._stages.get(name, 0.0) + duration_s

    def sent(self, num_tokens: int, now_s: float) -> float:
        """Tokens left at `now_s`. Returns the time since those before, for the first ones since the arrival."""
        assert num_tokens > 0
        since_s = now_s - self._last_s
        if self._first_s is None:
            self._first_s = now_s
        if self._second_s is None and self.num_tokens + num_tokens >= 2:
            self._second_s = now_s
        self.num_tokens += num_tokens
        self._last_s = now_s
        return since_s

    def close(self, now_s: float) -> None:
        self.end_s = now_s

    def tell(self, outcome: Outcome) -> None:
        """After `close`."""
        if self._on_end is not None:
            self._on_end(self, outcome)

    @property
    def e2e_s(self) -> float:
        return self.end_s - self.arrival_s

    @property
    def ttft_s(self) -> float | None:
        return None if self._first_s is None else self._first_s - self.arrival_s

    @property
    def handoff_gap_s(self) -> float | None:
        return None if self._first_s is None or self._second_s is None else self._second_s - self._first_s

    @property
    def decode_s(self) -> float | None:
        """First to last token."""
        return None if self._first_s is None else self._last_s - self._first_s

    @property
    def tpot_s(self) -> float | None:
        if self._first_s is None or self.num_tokens < 2:
            return None
        return (self._last_s - self._first_s) / (self.num_tokens - 1)

    def stage_s(self, name: str) -> float:
        """0 for one that did not happen."""
        return self._stages.get(name, 0.0)

    @property
    def stages(self) -> tuple[tuple[str, float], ...]:
        """All stages, in order of appearance; the last is what no stage claims (0 where they claim too much)."""
        rest_s = max(0.0, self.e2e_s - sum(self._stages.values()))
        return (*self._stages.items(), (UNATTRIBUTED, rest_s))

    def timeline(self) -> Timeline:
        """As it stands at its end."""
        return Timeline(
            self.e2e_s, self.ttft_s, self.tpot_s, self.handoff_gap_s, self.num_tokens, dict(self.stages), self.transfer
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a request, beside its times."""

    request_id: str
    end: FinishReason
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Timeline:
    """A ledger as others read it: the `timeline` of an answer, a line of the ledger file, a row of /debug/requests.

    Seconds; `stages` add up to `e2e_s`. None: it did not happen."""

    e2e_s: float
    ttft_s: float | None
    tpot_s: float | None
    handoff_gap_s: float | None
    num_tokens: int
    stages: dict[str, float]
    transfer: KvTransfer | None
