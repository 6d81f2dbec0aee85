"""The highest rate that keeps the targets: found by doubling or halving, then by bisection. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable

PRECISION = 0.1  # the answer is at most so much too low
MAX_DOUBLINGS = 10


def highest_rate(keeps: Callable[[float], bool], guess: float) -> float:
    """`keeps(rate)` is expected to be true up to some rate and false from there on. 0 if that is not above
    guess / 2**MAX_DOUBLINGS; never more than guess * 2**MAX_DOUBLINGS."""
    low, high = _bracket(keeps, guess)
    if not low or math.isinf(high):
        return low
    while high / low > 1 + PRECISION:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low


def _bracket(keeps: Callable[[float], bool], guess: float) -> tuple[float, float]:
    """A rate that is kept (else 0), and one that is not (else infinite)."""
    low, high, rate = 0.0, math.inf, guess
    for _ in range(MAX_DOUBLINGS + 1):
        if keeps(rate):
            low, rate = rate, rate * 2
        else:
            high, rate = rate, rate / 2
        if low and math.isfinite(high):
            break
    return low, high
