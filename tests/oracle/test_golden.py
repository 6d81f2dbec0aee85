"""The comparison itself, and the record of the oracle's tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.planes import NUMERICS_VERSION
from tests.oracle.combinations import FACTORS, Tally, all_combinations, all_pairs, pairs_of
from tests.oracle.compare import Expected, Verdict, compare
from tests.oracle.prompts import LONGEST, NUM_PROMPTS, SHORTEST, oracle_prompts, own_prompts
from tests.oracle.reference import NUM_NEW, golden, load_reference

RESULTS_PATH = Path(__file__).with_name("results.json")
EXPECTED = Expected(tokens=(5, 6, 7, 8), min_gap=3e-5, close_gaps={1: 3e-5, 2: 5e-4})


def test_equal_tokens_are_equal():
    assert compare(EXPECTED, (5, 6, 7, 8)).verdict is Verdict.EQUAL


def test_a_difference_at_a_near_tie_is_told_and_ends_the_comparison():
    outcome = compare(EXPECTED, (5, 9, 1, 1))
    assert outcome.verdict is Verdict.NEAR_TIE
    assert "step 1: 9 instead of 6" in outcome.details and "3.0e-05" in outcome.details


@pytest.mark.parametrize("got", [(5, 6, 9, 8), (4, 6, 7, 8), (5, 6, 7), (5, 6, 7, 8, 9), ()])
def test_any_other_difference_is_wrong(got):
    assert compare(EXPECTED, got).verdict is Verdict.WRONG


def test_a_near_tie_excuses_no_later_step():
    assert compare(EXPECTED, (5, 6, 7, 1)).verdict is Verdict.WRONG


def test_what_is_left_keeps_its_gaps():
    rest = EXPECTED.starting_at(1)
    assert rest.tokens == (6, 7, 8) and rest.close_gaps == {0: 3e-5, 1: 5e-4}
    first = EXPECTED.ending_at(2)
    assert first.tokens == (5, 6) and first.close_gaps == {1: 3e-5}


def test_all_pairs_holds_every_pair_and_is_short():
    chosen = all_pairs()
    wanted = set().union(*map(pairs_of, all_combinations()))
    assert set().union(*map(pairs_of, chosen)) == wanted
    assert len(chosen) <= len(FACTORS["chunk"]) * len(FACTORS["batch"]) + 2


@pytest.mark.parametrize("prompts_of", [oracle_prompts, own_prompts])
def test_prompts_are_spread_and_every_one_is_recorded(prompts_of):
    prompts = prompts_of(NUM_PROMPTS)
    lengths = [len(prompt.ids) for prompt in prompts]
    assert lengths == sorted(lengths) and (lengths[0], lengths[-1]) == (SHORTEST, LONGEST)
    assert len({prompt.digest for prompt in prompts}) == NUM_PROMPTS
    assert all(len(golden().expected(prompt.ids).tokens) == NUM_NEW for prompt in prompts)
    assert {prompt.is_chat for prompt in prompts_of(8)} == {True, False}


def test_the_record_is_of_this_numerics_version():
    """After a change that may alter tokens: raise NUMERICS_VERSION, `python -m tests.oracle.record`."""
    assert golden().numerics_version == NUMERICS_VERSION


def test_nothing_is_wrong_in_the_result_of_the_long_run():
    """After a change that may alter tokens: `make test-oracle` writes a new one. It takes an hour or two."""
    results = json.loads(RESULTS_PATH.read_text("utf-8"))
    assert not results["wrong"]
    if results["numerics_version"] != NUMERICS_VERSION:
        pytest.skip(f"the long run was of numerics version {results['numerics_version']}: make test-oracle is due")
    if results["not_run_yet"]:
        pytest.skip(f"{len(results['not_run_yet'])} rows of the long run are not run yet: make test-oracle goes on")


def test_a_tally_tells_a_wrong_answer_from_a_near_tie():
    """Another prompt's answer is wrong; and what was found is listed with the prompt's name."""
    first, second = oracle_prompts(8)[:2]
    tally = Tally()
    tally.count(first, golden().expected(second.ids), golden().expected(first.ids).tokens, "here")
    tally.count(first, EXPECTED, (5, 9, 1, 1), "here")
    tally.count(first, EXPECTED, (5, 6, 7, 8), "here")
    assert (tally.num_compared, tally.num_equal, len(tally.near_ties), len(tally.wrong)) == (3, 1, 1, 1)
    assert "clearly apart" in tally.wrong[0] and str(first) in tally.wrong[0]


@pytest.mark.slow
@pytest.mark.parametrize("index", [1, 3])
def test_the_record_is_what_transformers_says_now(index):
    prompt = oracle_prompts(8)[index]
    outcome = compare(golden().expected(prompt.ids), load_reference().greedy(prompt.ids).tokens)
    assert outcome.verdict is not Verdict.WRONG, outcome.details
