"""Policies in the simulator: ours keeps the targets of those whom it admits, as many as others serve at all."""

from __future__ import annotations

import pytest

from benchmarks.policies import ATTAINED, GUESS, outcome

SECONDS, OVERLOADED_SECONDS = 6.0, 4.0


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_below_capacity_next_to_nobody_is_refused_and_all_are_in_time(load: float) -> None:
    ours = outcome("slo", load, load * GUESS, SECONDS)
    assert ours.refused <= 0.01
    assert ours.attained >= 0.99


def test_at_twice_the_capacity_those_who_are_admitted_are_in_time_and_as_many_as_others_serve() -> None:
    ours, mooncake, blind = (
        outcome(policy, 2.0, 2 * GUESS, OVERLOADED_SECONDS) for policy in ("slo", "mooncake", "least_load")
    )
    assert ours.attained >= 0.99
    assert ours.goodput >= 0.9 * max(mooncake.goodput, blind.goodput)
    assert blind.attained < ATTAINED, "the load is one at which it matters"


def test_a_simulated_policy_decides_the_same_in_every_run() -> None:
    first, second = (outcome("slo", 1.0, GUESS, 2.0) for _ in range(2))
    assert first == second
