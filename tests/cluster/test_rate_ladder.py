"""The ladder by which benchmarks find a capacity: up from where enough is kept, down from where it is not."""

from __future__ import annotations

from itertools import pairwise

import pytest

from benchmarks.ladder import KEPT, RUNG, climb, crossing


def share_at(rate: float) -> float:
    """Falls evenly from all at 1/s to nothing at 2/s: through KEPT at 1.1/s."""
    return min(1.0, max(0.0, 2.0 - rate))


@pytest.mark.parametrize("first", [0.1, 0.99, 1.05, 1.2, 7.0])
def test_it_finds_where_the_share_crosses_from_above_and_from_below(first: float) -> None:
    steps = climb(share_at, first, falls=True, least=0.01)
    assert crossing(steps) == pytest.approx(1.1, rel=0.03)
    rungs = [after / before for (before, _), (after, _) in pairwise(steps)]
    assert rungs == pytest.approx([RUNG if first < 1.1 else 1 / RUNG] * len(rungs))


def test_who_is_not_better_than_the_best_is_tried_once() -> None:
    steps = climb(share_at, 1.5, falls=False, least=0.01)
    assert steps == [(1.5, 0.5)]
    assert crossing(steps) == 0.0


def test_it_ends_where_a_rate_tells_nothing_any_more() -> None:
    steps = climb(lambda _rate: KEPT / 2, 1.0, falls=True, least=0.5)
    assert 0.5 <= steps[-1][0] < 0.5 * RUNG
    assert crossing(steps) == 0.0


def test_a_rate_that_was_kept_alone_is_the_least_that_is_known() -> None:
    assert crossing([(1.0, 1.0)]) == 1.0
