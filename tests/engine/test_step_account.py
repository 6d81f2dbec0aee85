"""Where the time of a running sequence goes: steps and stalls, which add up to what has passed."""

from __future__ import annotations

import pytest

from engine.step_account import REPORT_EVERY, StepAccount
from engine.types import FinishReason, Key, TokenOutput

KEY = Key("r", 0)


def output(index: int, finish: FinishReason | None = None) -> TokenOutput:
    return TokenOutput(KEY, index, (7,), finish, stages=(("own", 1.0),) if index == 0 else ())


def account() -> StepAccount:
    return StepAccount(lambda key: True)


def test_steps_and_stalls_come_with_the_last_output_and_add_up_to_the_time_since_the_first() -> None:
    taken, one = [], account()
    for index, (step_s, now) in enumerate([(0.5, 10.0), (0.5, 10.5), (0.5, 13.0), (0.25, 13.25)]):
        taken += one.take((output(index, FinishReason.STOP if index == 3 else None),), step_s, now)
    assert [each.stages for each in taken[:3]] == [(("own", 1.0),), (), ()]
    assert taken[3].stages == (("steps", 1.25), ("stalls", 2.0))


def test_a_long_answer_reports_now_and_then_and_nothing_is_told_twice() -> None:
    one, stages = account(), []
    for index in range(3 * REPORT_EVERY):
        (taken,) = one.take((output(index, FinishReason.STOP if index == 3 * REPORT_EVERY - 1 else None),), 0.1, index)
        stages += taken.stages
    assert [name for name, _ in stages[1:]] == ["steps", "stalls"] * 3
    assert sum(duration_s for _, duration_s in stages[1:]) == pytest.approx(3 * REPORT_EVERY - 1)


def test_outputs_that_are_read_late_claim_no_more_than_has_passed() -> None:
    one = account()
    one.take((output(0),), 1.0, 5.0)
    one.take((output(1),), 1.0, 5.0)
    (last,) = one.take((output(2, FinishReason.STOP),), 1.0, 5.5)
    assert last.stages == (("steps", 0.5), ("stalls", 0.0))


def test_accounts_of_what_left_without_an_end_do_not_pile_up() -> None:
    one = StepAccount(lambda key: False)
    for number in range(1000):
        one.take((TokenOutput(Key(str(number), 0), 0, (7,)),), 0.1, 0.0)
    assert len(one._accounts) <= 65
