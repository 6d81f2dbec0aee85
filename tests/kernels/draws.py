"""Draws of rows, from what requests ask for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.types import SamplingParams
from kernels.backend import Draws


def draws_of(params: Sequence[SamplingParams], positions: Sequence[int]) -> Draws:
    return Draws(
        temperatures=np.array([one.temperature for one in params], np.float64),
        top_k=np.array([one.top_k for one in params], np.int64),
        top_p=np.array([one.top_p for one in params], np.float64),
        min_p=np.array([one.min_p for one in params], np.float64),
        keys=np.array([one.seed ^ (one.choice << 32) for one in params], np.uint64).view(np.int64),
        positions=np.array(positions, np.int64),
    )
