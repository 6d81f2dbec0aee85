"""Decode by a measured surface: seconds of a step over two axes, bilinear between its points.

Published tables are of two kinds: over sequences and their context, or over KV tokens of all sequences and their mean
context. Beyond the points a fitted quadratic of both axes, with no negative coefficient, goes on from the edge.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from cluster.simulator.service_times.nonnegative import nonnegative_fit
from cluster.simulator.service_times.rows import Point, Rows


class DecodeTable:
    """Implements service_times.phases.DecodeTimes."""

    def __init__(self, points: Sequence[Point], rows_are_batches: bool) -> None:
        """`points`: (num_decoding, mean context, seconds) if rows are batches, else (mean context, all KV tokens,
        seconds); seconds are positive."""
        self._rows_are_batches = rows_are_batches
        self._fit = _quadratic(points)
        self._rows = Rows(points, self._fitted)
        self.fixed_s = min(self._fit[0], *(seconds for _, _, seconds in points))
        self.context_token_s = self._fit[4] if rows_are_batches else self._fit[2]

    def decode_s(self, num_decoding: int, num_context: int) -> float:
        if self._rows_are_batches:
            return self._rows.at(num_decoding, num_context / num_decoding)
        return self._rows.at(num_context / num_decoding, num_context)

    def decode_each_s(self, num_decoding: int, contexts: range) -> list[float]:
        """`decode_s` of each context."""
        each = np.arange(contexts.start, contexts.stop, contexts.step, dtype=float)
        means = each / num_decoding
        if self._rows_are_batches:
            return self._rows.at_each(np.full(len(each), float(num_decoding)), means)
        return self._rows.at_each(means, each)

    def extrapolates(self, num_decoding: int, num_context: int) -> bool:
        mean = num_context / num_decoding
        row, along = (num_decoding, mean) if self._rows_are_batches else (mean, num_context)
        return not self._rows.covers(row, along)

    def _fitted(self, row: float, along: float) -> float:
        constant, per_row, per_along, row_square, both, along_square = self._fit
        straight = constant + per_row * row + per_along * along
        return straight + row_square * row * row + both * row * along + along_square * along * along


def grid(rows: Iterable[float], along: Sequence[float], values: Iterable[Sequence[float]]) -> list[Point]:
    """`values`: [row, along]."""
    return [
        (row, at, value)
        for row, line in zip(rows, values, strict=True)
        for at, value in zip(along, line, strict=True)
    ]  # fmt: skip


def _quadratic(points: Sequence[Point]) -> tuple[float, ...]:
    rows, along, times = np.array(points).T
    columns = np.stack([np.ones_like(rows), rows, along, rows**2, rows * along, along**2], axis=1)
    return tuple(nonnegative_fit(columns, times, 1 / times).tolist())
