"""Truncation of many rows at once against the sampler's of one."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampler import _keep_top
from engine.types import SamplingParams
from kernels.reference.truncation import keep_top

ROW = st.lists(st.sampled_from([-np.inf, -3.0, 0.0, 0.5, 0.5001, 1.0, 2.5]), min_size=9, max_size=9)
BOUNDS = st.tuples(st.integers(0, 12), st.sampled_from([1e-9, 0.1, 0.5, 0.9, 1.0]), st.sampled_from([0.0, 0.3, 1.0]))


@settings(deadline=None, max_examples=300)
@given(rows=st.lists(st.tuples(ROW, BOUNDS), min_size=1, max_size=4))
def test_what_it_keeps_is_what_the_sampler_keeps(rows: list) -> None:
    rows = [(row, bounds) for row, bounds in rows if max(row) > -np.inf]
    if not rows:
        return
    scaled = torch.tensor([row for row, _ in rows], dtype=torch.float64)
    top_k, top_p, min_p = zip(*(bounds for _, bounds in rows), strict=True)
    kept = keep_top(
        scaled, torch.tensor(top_k), torch.tensor(top_p, dtype=torch.float64), torch.tensor(min_p, dtype=torch.float64)
    )  # fmt: skip
    for row, own, (k, p, least) in zip(scaled.numpy(), kept.numpy(), (bounds for _, bounds in rows), strict=True):
        with np.errstate(divide="ignore"):
            wanted = _keep_top(row, SamplingParams(top_k=k, top_p=p, min_p=least))
        assert np.array_equal(np.flatnonzero(own > -np.inf), wanted)
        assert np.array_equal(own[wanted], row[wanted])
