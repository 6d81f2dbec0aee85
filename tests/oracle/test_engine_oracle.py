"""One engine gives transformers' tokens, however it chunks, batches, caches and places blocks.

Eight prompts over pairwise combinations, and the first tokens of each answer; `make test-oracle` runs forty over all,
to the end. A step costs about the same for one sequence as for sixteen, so batches of sixteen take every prompt and
smaller ones take the prompts in turns; and a long prompt is spared a small chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace

import pytest

from engine.types import EngineStats, FinishReason, Request, SamplingParams
from tests.oracle.combinations import (
    WHOLE,
    Case,
    Combination,
    Tally,
    all_pairs,
    check_engine,
    fitting,
    lab,
    processes,
    run,
)
from tests.oracle.prompts import WHOLE_BLOCKS, oracle_prompts
from tests.oracle.reference import NUM_NEW, golden

pytestmark = pytest.mark.slow

LONGEST = {1: 70, 7: 140, 64: 700}  # tokens of a prompt, by chunk
LONGEST_COMPANION = 70
NUM_FIRST = 36  # tokens of each answer: more than a block of either size
NUM_KNOWN = 21  # tokens that a companion of the eight prompts has already when it comes


@pytest.fixture(scope="module")
def answers() -> Iterator[dict[Combination, Future[tuple[Tally, EngineStats, float]]]]:
    """Every combination's, computed in other processes while tests ask for one after the other."""
    with processes() as pool:
        yield {one: pool.submit(check_engine, one, chosen_for(one)) for one in all_pairs()}
        pool.shutdown(cancel_futures=True)


def cases() -> list[Case]:
    return [Case(prompt, golden().expected(prompt.ids), num_new=NUM_FIRST) for prompt in oracle_prompts(8)]


def companions() -> list[Case]:
    """The short ones again, as they come after a move from another engine: with tokens of their own."""
    return [replace(one, num_known=NUM_KNOWN) for one in cases() if len(one.prompt.ids) <= LONGEST_COMPANION]


def chosen_for(one: Combination) -> list[Case]:
    """The cases that a combination takes."""
    alike = [other for other in all_pairs() if other.batch == one.batch]
    stride = {1: 4, 4: 2, 16: 1}[one.batch]
    turn = (alike.index(one) - 1) % stride  # so that the smallest chunk, which comes first, finds a cached beginning
    prompts = fitting(cases(), LONGEST.get(one.chunk, WHOLE))[turn::stride]
    return prompts + (companions() if one.batch == 16 else [])


@pytest.mark.parametrize("one", all_pairs(), ids=str)
def test_engine_gives_the_oracles_tokens(answers: dict, total: Tally, one: Combination):
    tally, stats, _ = answers[one].result()
    total.add(tally)
    assert not tally.wrong, str(tally)
    assert (stats.num_free_blocks, stats.num_leaked_blocks) == (stats.num_blocks, 0)
    wants_hits = one.prefix_cache and any(len(case.prompt.ids) >= WHOLE_BLOCKS for case in chosen_for(one))
    assert (stats.prefix_hits > 0) == wants_hits


def test_preempted_sequences_go_on_as_if_nothing_had_been(total: Tally):
    """A pool in which three prompts fit, but not what they grow to."""
    one = Combination(chunk=64, batch=4, prefix_cache=False, shuffled=True, block_size=16)
    chosen = [case for case in cases() if 10 < len(case.prompt.ids) < 70]
    blocks_at_start = sum(-(-len(case.prompt.ids) // one.block_size) for case in chosen)
    engine, model = lab().make(one, blocks_at_start + 3)
    results = run(engine, model, [case.request(f"{index}") for index, case in enumerate(chosen)])
    tally = Tally()
    for index, case in enumerate(chosen):
        tally.count(case.prompt, case.rest, results[f"{index}"].tokens, "preempted")
    total.add(tally)
    assert engine.stats().num_preemptions > 0
    assert not tally.wrong, str(tally)


def test_end_of_sequence_ends_a_request_where_the_oracle_says_it():
    """The recorded tokens ignore the end; with it, the tokens up to it are the same."""
    one = Combination(chunk=WHOLE, batch=16, prefix_cache=True, shuffled=True, block_size=16)
    engine, model = lab().make(one, 400)
    ending = {
        f"{index}": case.expected.tokens[: case.expected.tokens.index(end) + 1]
        for index, case in enumerate(cases())
        for end in sorted(engine.spec.eos_token_ids)
        if end in case.expected.tokens and len(case.prompt.ids) < 700
    }
    params = SamplingParams(max_tokens=NUM_NEW, temperature=0.0)
    results = run(engine, model, [Request(name, cases()[int(name)].prompt.ids, params) for name in ending])
    assert ending, "no prompt ends within the recorded tokens"
    for name, tokens in ending.items():
        assert (results[name].tokens, results[name].finish) == (tokens, FinishReason.STOP)
