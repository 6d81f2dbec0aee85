"""Gaps between tokens: how many of which length, for quantiles over all tokens of a simulation in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

SHORTEST_S = 1e-6
BUCKETS_PER_E = 1000  # a bucket is a thousandth wide
NUM_BUCKETS = 25 * BUCKETS_PER_E  # up to 20 hours


@dataclass(slots=True)
class Gaps:
    """Counts by length, on a logarithmic scale; shorter and longer ones are in the first and the last bucket."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(NUM_BUCKETS, dtype=np.int64))  # [NUM_BUCKETS]

    def add(self, times: Sequence[float]) -> None:
        """The gaps between successive times, in seconds."""
        if len(times) < 2:
            return
        gaps = np.diff(np.asarray(times))
        places = np.log(np.maximum(gaps, SHORTEST_S) / SHORTEST_S) * BUCKETS_PER_E
        np.add.at(self.counts, np.minimum(places.astype(np.int64), NUM_BUCKETS - 1), 1)

    def quantile(self, share: float) -> float | None:
        """Seconds; the middle of its bucket, None without any gap."""
        total = int(self.counts.sum())
        if not total:
            return None
        place = int(np.searchsorted(np.cumsum(self.counts), share * total, side="left"))
        return SHORTEST_S * float(np.exp((place + 0.5) / BUCKETS_PER_E))
