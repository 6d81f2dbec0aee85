"""A fit finds the cost of what it sees, keeps out what does not belong, and gives a usable number whatever comes."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.fit import LONGEST_S, Fit

COSTS = (0.008, 0.3, 0.02)
PRIOR = (0.01, 0.01, 0.01)
FEW_DOZEN = 36
ABSURD = st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from((0.0, -1.0, 1e300, 1e-300))


def seconds(features: tuple[float, ...], costs: tuple[float, ...] = COSTS) -> float:
    return sum(map(float.__mul__, costs, features))


def shapes(chance: random.Random, count: int) -> Iterator[tuple[float, ...]]:
    return ((1.0, chance.uniform(0.05, 1), chance.uniform(0, 4)) for _ in range(count))


def trained(chance: random.Random, count: int, noise: float = 0.05, pace: float = 1.0, fit: Fit | None = None) -> Fit:
    fit = fit or Fit(PRIOR)
    for features in shapes(chance, count):
        fit.learn(features, pace * seconds(features) * chance.lognormvariate(0, noise))
    return fit


def worst_error(fit: Fit, pace: float = 1.0) -> float:
    """Over the corners of what was seen, and beyond it."""
    corners = [(1.0, tokens, pairs) for tokens in (0.05, 1.0, 4.0) for pairs in (0.0, 4.0, 16.0)]
    return max(abs(fit.predict(corner) / (pace * seconds(corner)) - 1) for corner in corners)


def test_it_finds_the_cost_of_each_feature_under_noise() -> None:
    assert worst_error(trained(random.Random(1), 400)) < 0.2


def test_one_record_sets_the_scale_of_everything() -> None:
    fit = Fit(PRIOR)
    before = fit.predict((1.0, 2.0, 3.0))
    assert fit.learn((1.0, 0.5, 0.5), 100 * fit.predict((1.0, 0.5, 0.5)))
    assert fit.predict((1.0, 2.0, 3.0)) > 50 * before


def test_now_and_then_a_record_that_took_far_too_long_changes_nothing() -> None:
    chance = random.Random(2)
    fit = trained(chance, 200)
    before = worst_error(fit)
    for features in shapes(chance, 100):
        fit.learn(features, seconds(features))
        if chance.random() < 0.1:
            assert not fit.learn(features, 10 * seconds(features))
    assert worst_error(fit) < before + 0.05


@pytest.mark.parametrize("pace", [0.3, 3.0])
def test_a_machine_that_changes_is_learnt_within_a_few_dozen_steps(pace: float) -> None:
    chance = random.Random(3)
    fit = trained(chance, 400)
    trained(chance, FEW_DOZEN, pace=pace, fit=fit)
    assert worst_error(fit, pace) < 0.35


def test_what_is_not_seen_for_long_is_not_forgotten() -> None:
    chance = random.Random(4)
    fit = trained(chance, 400)
    for _ in range(20_000):
        fit.learn((1.0, 0.1, 0.0), seconds((1.0, 0.1, 0.0)) * chance.lognormvariate(0, 0.05))
    assert fit.predict((1.0, 0.1, 4.0)) == pytest.approx(seconds((1.0, 0.1, 4.0)), rel=0.4)


def test_more_of_anything_never_takes_less_time() -> None:
    fit = Fit(PRIOR)
    for size in range(1, 50):  # taken at its word this would say that tokens cost less than nothing
        fit.learn((1.0, size / 10, 0.0), 1.0 / size)
    predicted = [fit.predict((1.0, float(size), 0.0)) for size in range(10)]
    assert predicted == sorted(predicted)


@settings(max_examples=50)
@given(
    st.lists(st.tuples(ABSURD, ABSURD, ABSURD, ABSURD), max_size=30),
    st.lists(st.floats(0, 1e30), min_size=3, max_size=3),
)
def test_nothing_that_comes_makes_a_prediction_absurd(
    records: list[tuple[float, float, float, float]], asked: list[float]
) -> None:
    fit = Fit(PRIOR)
    for *features, measured_s in records:
        fit.learn(features, measured_s)
        predicted = fit.predict(asked)
        assert math.isfinite(predicted) and 0 < predicted <= LONGEST_S
