"""Prefill by a measured curve: seconds over the length of one prompt that a step computes whole.

1. between points it is linear; below the first one it stays, since so short a prompt waits for the weights;
2. beyond the last one a fitted a + b n + c n^2, with no negative coefficient, goes on from there;
3. a step of several chunks costs what the curve says for all their new tokens together, so that what a step pays once
   (overhead, reading the weights) is paid once. c corrects attention's part: the curve has it for one prompt, where
   each token sees all before it; a chunk of n tokens after m (cached, or of earlier chunks) has n (n + 2 m) of it
   instead. A step never costs less than its largest chunk's new tokens alone.

For a curve that is its own fit, a chunk after m tokens thus costs a + curve(m + n) - curve(m).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from cluster.simulator.service_times.nonnegative import nonnegative_fit
from engine.step_shape import Chunk


class PrefillTable:
    """Implements service_times.phases.PrefillTimes."""

    def __init__(self, lengths: Sequence[float], seconds: Sequence[float]) -> None:
        """`lengths` rise strictly, at least two of them; all are positive."""
        self._lengths = list(map(float, lengths))
        self._seconds = list(map(float, seconds))
        sizes, times = np.array(self._lengths), np.array(self._seconds)
        columns = np.stack([np.ones_like(sizes), sizes, sizes**2], axis=1)
        self._fit: tuple[float, float, float] = tuple(nonnegative_fit(columns, times, 1 / times).tolist())
        self.fixed_s = min(self._fit[0], *self._seconds)
        self.token_s = self._fit[1]

    def chunks_s(self, chunks: Sequence[Chunk]) -> float:
        if len(chunks) == 1 and not chunks[0].num_before:
            return self._alone_s(chunks[0].num_new)
        num_new = sum(chunk.num_new for chunk in chunks)
        squares = sum(chunk.num_new * (chunk.num_new + 2 * chunk.num_before) for chunk in chunks)
        together_s = self._alone_s(num_new) + self._fit[2] * (squares - num_new**2)
        return max(together_s, self._alone_s(max(chunk.num_new for chunk in chunks)))

    def extrapolates(self, chunks: Sequence[Chunk]) -> bool:
        longest = max(chunk.num_before + chunk.num_new for chunk in chunks)
        num_new = sum(chunk.num_new for chunk in chunks)
        return num_new < self._lengths[0] or max(num_new, longest) > self._lengths[-1]

    def _alone_s(self, num_tokens: int) -> float:
        lengths, seconds = self._lengths, self._seconds
        above = bisect_right(lengths, num_tokens)
        if not above:
            return seconds[0]
        below = above - 1
        if above < len(lengths):
            part = (num_tokens - lengths[below]) / (lengths[above] - lengths[below])
            return seconds[below] * (1.0 - part) + seconds[above] * part
        _, linear, square = self._fit
        last = lengths[below]
        return seconds[below] + linear * (num_tokens - last) + square * (num_tokens**2 - last**2)
