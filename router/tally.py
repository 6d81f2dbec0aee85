"""A histogram of one process's loop: a count per bucket, which a scrape turns into a metric family.

prometheus_client's own takes a lock and walks all buckets for each value, which at one value per token is a good
part of what a token costs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Tally:
    """Not for several threads. `buckets` are upper bounds, inclusive, rising."""

    def __init__(self, buckets: tuple[float, ...]) -> None:
        self.buckets = buckets
        self.counts = [0] * (len(buckets) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.buckets, value)] += 1
        self.sum += value


class TallyCollector(Collector):
    def __init__(self, name: str, words: str, model_name: str, tally: Tally) -> None:
        self._name = name
        self._words = words
        self._model_name = model_name
        self._tally = tally

    def describe(self) -> list[HistogramMetricFamily]:
        return [HistogramMetricFamily(self._name, self._words, labels=["model_name"])]

    def collect(self) -> Iterator[HistogramMetricFamily]:
        bounds = [*map(floatToGoString, self._tally.buckets), "+Inf"]
        counts = list(zip(bounds, map(float, accumulate(self._tally.counts)), strict=True))
        family = HistogramMetricFamily(self._name, self._words, labels=["model_name"])
        family.add_metric([self._model_name], counts, self._tally.sum)
        yield family
