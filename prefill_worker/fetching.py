"""Is a prefix that another worker has worth fetching, or is it computed sooner? Pure, and the measure behind it.

A worker learns from its own steps how long a prompt's token takes it, and from its carriers how fast KV comes.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.step_shape import StepRecord

OVERHEAD_S = 0.005  # of a loan: two small calls, a turn of each engine
NEWEST = 0.2  # weight of a step against what was known


class PrefillPace:
    """Seconds that a prompt's token takes here: a running average over steps with chunks, by their tokens."""

    def __init__(self) -> None:
        self.token_s: float | None = None

    def learn(self, steps: Iterable[StepRecord]) -> None:
        for record in steps:
            num_tokens = record.shape.num_chunk_tokens
            if num_tokens:
                token_s = record.step_s / num_tokens
                known = self.token_s if self.token_s is not None else token_s
                self.token_s = known + NEWEST * (token_s - known)


def is_worth_fetching(num_tokens: int, token_bytes: float, bytes_per_s: float | None, token_s: float | None) -> bool:
    """Would these tokens' KV be here before it is computed? Not as long as nothing was ever computed here; a link that
    was never measured is tried."""
    if token_s is None or num_tokens == 0:
        return False
    moving_s = 0.0 if bytes_per_s is None else num_tokens * token_bytes / bytes_per_s
    return OVERHEAD_S + moving_s < num_tokens * token_s
