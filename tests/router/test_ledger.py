"""A request's stages and times, on one clock."""

from __future__ import annotations

import pytest

from engine.types import Key, KvTransfer, TokenOutput
from router.ledger import Ledger


def test_times_are_between_arrival_and_tokens() -> None:
    ledger = Ledger(10.0)
    assert [ledger.sent(1, 10.5), ledger.sent(1, 11.5), ledger.sent(2, 12.0)] == [0.5, 1.0, 0.5]
    ledger.close(13.0)
    assert (ledger.ttft_s, ledger.handoff_gap_s, ledger.tpot_s, ledger.e2e_s) == (0.5, 1.0, 0.5, 3.0)


def test_tokens_that_leave_together_have_no_gap() -> None:
    ledger = Ledger(0.0)
    ledger.sent(3, 1.0)
    assert (ledger.ttft_s, ledger.handoff_gap_s, ledger.tpot_s) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_what_did_not_happen_is_none(num_tokens: int) -> None:
    ledger = Ledger(0.0)
    if num_tokens:
        ledger.sent(num_tokens, 1.0)
    assert (ledger.handoff_gap_s, ledger.tpot_s) == (None, None)
    assert (ledger.ttft_s is None) is (num_tokens == 0)


def test_stages_add_up_to_the_whole() -> None:
    ledger = Ledger(0.0)
    ledger.add_stages((("prefill", 1.0), ("transfer", 0.5)))
    ledger.add_stages((("decode", 0.25),))
    ledger.add_stages((("decode", 0.25),))
    ledger.close(3.0)
    assert ledger.stages == (("prefill", 1.0), ("transfer", 0.5), ("decode", 0.5), ("unattributed", 1.0))


def test_the_last_transfer_counts_and_an_output_without_one_takes_it_away_from_nobody() -> None:
    ledger, key = Ledger(0.0), Key("r", 0)
    assert ledger.transfer is None
    for size_bytes in (10, 20):
        transfer = KvTransfer("shm", size_bytes, 5, 1.0, 0.5)
        ledger.take(TokenOutput(key, 1, (7,), stages=(("decode", 0.25),), transfer=transfer))
        ledger.take(TokenOutput(key, 2, (8,)))
    assert ledger.transfer == KvTransfer("shm", 20, 5, 1.0, 0.5)
    assert KvTransfer("shm", 20, 5, 1.0, 0.5).hidden_share == 0.25
    assert ledger.stages[0] == ("decode", 0.5)


def test_of_a_transfer_that_had_nothing_to_move_all_was_hidden() -> None:
    assert KvTransfer("shm", 0, 0, 0.0, 0.0).hidden_share == 1.0


def test_overlapping_stages_leave_nothing_unattributed() -> None:
    ledger = Ledger(0.0)
    ledger.add_stages((("prefill", 2.0), ("transfer", 2.0)))
    ledger.close(3.0)
    assert ledger.stages[-1] == ("unattributed", 0.0)
