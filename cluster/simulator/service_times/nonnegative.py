"""Least squares without negative coefficients: how every fit of service times is made, so that more work never takes
less time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def nonnegative_fit(columns: Floats, targets: Floats, weights: Floats) -> Floats:
    """The x >= 0 of least sum of (weights * (columns @ x - targets))**2. Of equal ones, the one with fewest terms.

    columns: [num_points, num_terms], num_terms at most about 6: every subset of the terms is tried."""
    weighted = columns * weights[:, None]
    scales = np.maximum(np.linalg.norm(weighted, axis=0), np.finfo(np.float64).tiny)
    both = np.column_stack([weighted / scales, targets * weights])
    small: Floats = np.asarray(np.linalg.qr(both, mode="r"))  # the same problem in as many rows as terms + 1
    scaled, aims = small[:, :-1], small[:, -1]
    best, best_error = np.zeros(columns.shape[1]), float(aims @ aims)
    for terms in _subsets(columns.shape[1]):
        chosen = scaled[:, terms]
        solved = np.linalg.lstsq(chosen, aims, rcond=None)[0]
        if (solved < 0).any():
            continue
        missed = chosen @ solved - aims
        if (error := float(missed @ missed)) < best_error * (1 - 1e-12):
            best, best_error = np.zeros(columns.shape[1]), error
            best[terms] = solved
    return best / scales


def _subsets(num_terms: int) -> Iterator[list[int]]:
    for size in range(1, num_terms + 1):
        yield from map(list, combinations(range(num_terms), size))
