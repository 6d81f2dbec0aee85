"""The stages of one request on one clock: when it came, when its tokens left, and where the time went.

All times are the gateway's loop time. Workers report durations of their own stages; what no stage claims is
the stage `unattributed`. TTFT is arrival to first token sent, the hand-off gap first to second token, TPOT
(t_last - t_first) / (n - 1) with n >= 2, the gap included. `transfer` is how KV came to where it decodes, by that
worker's clock: its last one, if the request was placed again.
"""

from __future__ import annotations

from engine.types import KvTransfer, TokenOutput

UNATTRIBUTED = "unattributed"


class Ledger:
    """One request's record. Tokens that leave together have the same time."""

    def __init__(self, arrival_s: float) -> None:
        self.arrival_s = arrival_s
        self.num_tokens = 0
        self.end_s = arrival_s
        self.transfer: KvTransfer | None = None
        self._first_s: float | None = None
        self._second_s: float | None = None
        self._last_s = arrival_s
        self._stages: dict[str, float] = {}

    def take(self, output: TokenOutput) -> None:
        """What a worker tells of its part, with the tokens that it made."""
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
    def tpot_s(self) -> float | None:
        if self._first_s is None or self.num_tokens < 2:
            return None
        return (self._last_s - self._first_s) / (self.num_tokens - 1)

    @property
    def stages(self) -> tuple[tuple[str, float], ...]:
        """All stages, in order of appearance; the last is what no stage claims (0 where stages overlap)."""
        rest_s = max(0.0, self.e2e_s - sum(self._stages.values()))
        return (*self._stages.items(), (UNATTRIBUTED, rest_s))
