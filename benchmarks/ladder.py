"""A ladder of rates: where the share of requests that keep their targets falls below what is wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

KEPT = 0.9  # of the requests: a rate at which fewer keep their targets is too high
RUNG = 1.25  # from one rate to the next

Step = tuple[float, float]  # a rate in requests/s, and the share that kept its targets there


def climb(share_at: Callable[[float], float], rate: float, *, falls: bool, least: float) -> list[Step]:
    """Steps from this rate up to the first at which less than KEPT is kept; where that is this one and `falls`, down to
    the first at which so much is, but not below `least`."""
    steps = list[Step]()
    while True:
        steps.append((rate, share_at(rate)))
        rises = steps[0][1] >= KEPT
        if rises != (steps[-1][1] >= KEPT) or not (rises or falls):
            return steps
        rate = rate * RUNG if rises else rate / RUNG
        if rate < least:
            return steps


def crossing(steps: Sequence[Step]) -> float:
    """The rate, between those around it, at which the share crosses KEPT; the highest that was tried where all keep so
    much; 0 where none does."""
    kept = max((step for step in steps if step[1] >= KEPT), default=None)
    lost = min((step for step in steps if step[1] < KEPT), default=None)
    if kept is None or lost is None:
        return kept[0] if kept else 0.0
    (rate, share), (high_rate, low_share) = kept, lost
    return rate + (high_rate - rate) * (share - KEPT) / (share - low_share)
