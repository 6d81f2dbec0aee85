"""Quantiles of gaps from counts: as near to the exact ones as a bucket is wide."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.simulator.gaps import Gaps

lengths = st.lists(st.floats(1e-4, 50.0), min_size=1, max_size=60)


@given(st.lists(lengths, min_size=1, max_size=4), st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_is_that_of_all_gaps_that_were_added(parts: list[list[float]], share: float) -> None:
    gaps = Gaps()
    for part in parts:
        gaps.add(list(accumulate(part, initial=3.0)))
    every = sorted(gap for part in parts for gap in part)
    exact = every[max(0, math.ceil(share * len(every) - 1e-9) - 1)]
    assert gaps.quantile(share) == pytest.approx(exact, rel=2e-3)
    assert gaps.counts.sum() == len(every)


def test_no_gap_has_no_quantile_and_extremes_are_counted_at_the_ends() -> None:
    gaps = Gaps()
    gaps.add([1.0])
    assert gaps.quantile(0.5) is None
    gaps.add([0.0, 0.0, 1e9])
    assert (gaps.counts[0], gaps.counts[-1], gaps.counts.sum()) == (1, 1, 2)
