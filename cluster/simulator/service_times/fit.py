"""Fits the roofline to measured steps: overhead + max(memory, compute), no coefficient below zero.

1. what was measured of one shape counts once, by its median;
2. from several first guesses of which steps are bound by memory, in turn: fit with each step on its side, and put each
   on the side that takes longer by the fit. Errors are relative; steps far from the fit weigh less (Huber);
3. the guess that ends nearest to the measurements is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import numpy.typing as npt

from cluster.simulator.service_times.nonnegative import Floats, nonnegative_fit
from cluster.simulator.service_times.roofline import Roofline, num_pairs, num_read
from engine.step_shape import StepRecord, StepShape

NUM_GUESSES = 8
MAX_ROUNDS = 12
MAX_ERROR = 0.5  # what a measurement that is far off counts for, when fits are compared
HUBER = 2.0  # in median errors: what is further off weighs less


@dataclass(frozen=True, slots=True)
class Fitted:
    """Errors are relative, over the shapes' medians."""

    times: Roofline
    median_error: float
    p90_error: float
    num_shapes: int


def fit_roofline(records: Sequence[StepRecord]) -> Fitted:
    """At least one record; the more shapes differ, the better it tells the terms apart."""
    medians = medians_of(records)
    work, seconds = _work(medians), np.array(list(medians.values()))
    guesses = [work.num_computed <= limit for limit in _limits(work.num_computed)]
    fits = [_refine(work, seconds, guess) for guess in guesses]
    errors = [np.abs(work.seconds(fit) / seconds - 1) for fit in fits]
    best = min(range(len(fits)), key=lambda index: float(np.minimum(errors[index], MAX_ERROR).mean()))
    times = Roofline(*(float(value) for value in fits[best]))
    p50, p90 = np.quantile(errors[best], (0.5, 0.9))
    return Fitted(times, float(p50), float(p90), len(medians))


def medians_of(records: Iterable[StepRecord]) -> Mapping[StepShape, float]:
    """Seconds by shape."""
    found: dict[StepShape, list[float]] = {}
    for record in records:
        found.setdefault(record.shape, []).append(record.step_s)
    return {shape: median(seconds) for shape, seconds in found.items()}


@dataclass(frozen=True, slots=True)
class _Work:
    """What shapes ask for: a row of each array for each shape. A fit has six terms, in the order of Roofline's
    fields: overhead, weights, context | prefill, decode, pairs."""

    memory: Floats  # [num_shapes, 6], compute's terms 0
    compute: Floats  # [num_shapes, 6], memory's terms 0
    num_computed: Floats  # tokens, [num_shapes]

    def seconds(self, fit: Floats) -> Floats:
        return np.maximum(self.memory @ fit, self.compute @ fit)


def _work(shapes: Iterable[StepShape]) -> _Work:
    rows = [(shape.num_chunk_tokens, shape.num_decoding, num_pairs(shape), num_read(shape)) for shape in shapes]
    chunk_tokens, decoding, pairs, read = np.array(rows, dtype=np.float64).T
    one, none = np.ones_like(read), np.zeros_like(read)
    memory = np.stack([one, one, read, none, none, none], axis=1)
    compute = np.stack([one, none, none, chunk_tokens, decoding, pairs], axis=1)
    return _Work(memory, compute, chunk_tokens + decoding)


def _limits(num_computed: Floats) -> list[float]:
    """Steps of at most so many tokens are guessed to be bound by memory: from none to all."""
    return [0.0, *np.unique(np.quantile(num_computed, np.linspace(0, 1, NUM_GUESSES))).tolist()]


def _refine(work: _Work, seconds: Floats, by_memory: npt.NDArray[np.bool_]) -> Floats:
    best, best_error = np.zeros(6), np.inf
    before, trust = best, np.ones_like(seconds)
    for _ in range(MAX_ROUNDS):
        fit = nonnegative_fit(np.where(by_memory[:, None], work.memory, work.compute), seconds, trust / seconds)
        errors = np.abs(work.seconds(fit) / seconds - 1)
        if (error := float(np.minimum(errors, MAX_ERROR).mean())) < best_error:
            best, best_error = fit, error
        if np.allclose(fit, before, rtol=1e-9, atol=0):
            break
        before, near = fit, max(HUBER * float(np.median(errors)), 1e-12)
        trust = np.sqrt(near / np.maximum(errors, near))
        by_memory = work.memory @ fit >= work.compute @ fit
    return best
