"""Arrivals: what came to one gateway and how it fared, for whoever sizes the pools (cluster/control).

1. `came` notes each request when it is first to be placed, refused ones, too: measured where requests end, demand would
   look like what is served already, and a queue that grows would not be seen;
2. `fared` notes how it ended, by what it was promised;
3. `take` gives what has been noted since the last time. Of what nobody takes the oldest are forgotten.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

MOST_NOTED = 20_000  # of each kind


@dataclass(frozen=True, slots=True)
class Arrived:
    """One request. `compute_s`: its prompt alone on a prefill worker, less what is cached where the most of it is."""

    at: float  # on the gateway's clock, s
    num_prompt: int
    num_cached: int
    num_output: float  # expected
    compute_s: float
    ttft_s: float  # promised; infinite: nothing was
    tpot_s: float


@dataclass(frozen=True, slots=True)
class Fared:
    """How one ended. A promise that was not made is kept. `refused`: what was lacking (router/policies), else empty."""

    at: float
    refused: str
    ttft_kept: bool
    tpot_kept: bool


class Arrivals:
    def __init__(self) -> None:
        self._arrived: deque[Arrived] = deque(maxlen=MOST_NOTED)
        self._fared: deque[Fared] = deque(maxlen=MOST_NOTED)

    def came(self, arrived: Arrived) -> None:
        self._arrived.append(arrived)

    def fared(self, fared: Fared) -> None:
        self._fared.append(fared)

    def take(self) -> tuple[tuple[Arrived, ...], tuple[Fared, ...]]:
        taken = tuple(self._arrived), tuple(self._fared)
        self._arrived.clear()
        self._fared.clear()
        return taken
