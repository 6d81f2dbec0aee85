"""The engine by its records: what each command answers, what it refuses, how a request ends, what a hand-off tells."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from engine.block_manager import Holder, HolderKind
from engine.engine import LEAK_CHECK_STEPS, Engine, EngineSpec
from engine.prefix import extend_hashes, root_hash
from engine.scheduler import Batch, SchedulerLimits
from engine.types import (
    Abort,
    Add,
    Adopt,
    FinishReason,
    Key,
    Progress,
    Release,
    Request,
    Reserve,
    Reserved,
    Sampled,
    SamplingParams,
    StepOutputs,
    TokenOutput,
)

EOS = 2
VOCAB = 100
BLOCK = 4


class Script:
    """A model runner that says these tokens, one to each item that samples, and 9 when they are used up."""

    def __init__(self, *token_ids: int) -> None:
        self._token_ids = iter(token_ids)

    def execute(self, batch: Batch) -> list[Sampled]:
        return [Sampled((next(self._token_ids, 9),)) if item.samples else Sampled() for item in batch.scheduled]


def make_engine(num_blocks: int = 16, max_context: int = 200, chunk: int = 8, lookahead: int = 0) -> Engine:
    limits = SchedulerLimits(BLOCK, max_batch_tokens=16, max_batch_seqs=4, prefill_chunk=chunk, lookahead=lookahead)
    return Engine(EngineSpec(limits, num_blocks, max_context, VOCAB, frozenset({EOS}), b"key"))


def request(name: str = "r", prompt: Iterable[int] = (5, 6, 7), max_tokens: int = 4, **sampling) -> Request:
    return Request(name, tuple(prompt), SamplingParams(max_tokens=max_tokens, **sampling))


def turn(engine: Engine, runner: Script) -> tuple[StepOutputs, StepOutputs] | None:
    """What came out before the step was computed, and after."""
    batch = engine.begin()
    if batch is None:
        return None
    before = engine.take_outputs()
    engine.finish(batch, runner.execute(batch))
    return before, engine.take_outputs()


def run(engine: Engine, runner: Script) -> list[TokenOutput]:
    tokens = list(engine.take_outputs().tokens)
    for _ in range(1000):
        outputs = turn(engine, runner)
        if outputs is None:
            return tokens
        tokens += [*outputs[0].tokens, *outputs[1].tokens]
    raise AssertionError("the engine does not come to an end")


def reserve(engine: Engine, key: Key, num_tokens: int, num_growth: int = 0) -> Reserved:
    engine.handle(Reserve(key, num_tokens, num_growth))
    (answer,) = engine.take_outputs().reserved
    return answer


def only_error(engine: Engine) -> tuple[str, str]:
    """Code and message of the one output, which ends its request."""
    (output,) = engine.take_outputs().tokens
    assert output.finish is FinishReason.ERROR and output.error is not None
    assert output.token_ids == ()
    return output.error.code, output.error.message


def assert_empty(engine: Engine) -> None:
    assert engine.begin() is None
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_held, stats.num_held_blocks) == (0, 0, 0, 0)
    assert stats.num_free_blocks == stats.num_blocks
    assert stats.num_leaked_blocks == 0


# --- Add ------------------------------------------------------------------------------------------------------

REFUSED = {
    "an empty prompt": (request(prompt=()), "the prompt is empty"),
    "a prompt as long as the context": (request(prompt=[5] * 40), "40 tokens do not fit the context of 40"),
    "a token below the vocabulary": (request(prompt=(5, -1)), "vocabulary of 100"),
    "a token above the vocabulary": (request(prompt=(5, VOCAB)), "vocabulary of 100"),
    "a generated token outside": (replace(request(), generated_ids=(VOCAB,)), "vocabulary of 100"),
    "more than the pool can ever hold": (request(prompt=[5] * 20, max_tokens=13), "do not fit the KV pool of 32"),
}  # fmt: skip


@pytest.mark.parametrize(("bad", "message"), REFUSED.values(), ids=REFUSED)
def test_a_request_that_can_never_be_computed_ends_with_an_error(bad: Request, message: str) -> None:
    engine = make_engine(num_blocks=8, max_context=40)
    engine.handle(Add(bad))
    code, text = only_error(engine)
    assert code == "invalid_request" and message in text
    assert_empty(engine)


def test_a_refused_request_leaves_others_alone() -> None:
    engine = make_engine()
    engine.handle(Add(request("good", max_tokens=2)))
    engine.handle(Add(request("bad", prompt=())))
    tokens = [output for output in run(engine, Script(11, 12)) if output.key.request_id == "good"]
    assert [output.token_ids for output in tokens] == [(11,), (12,)]


def test_max_tokens_beyond_the_context_count_only_up_to_it() -> None:
    engine = make_engine(num_blocks=8, max_context=32)
    engine.handle(Add(request(prompt=[5] * 20, max_tokens=1000, ignore_eos=True)))
    tokens = run(engine, Script())
    assert len(tokens) == 12
    assert tokens[-1].finish is FinishReason.LENGTH
    assert_empty(engine)


def test_a_request_that_fitted_fits_again_with_some_of_its_tokens_generated() -> None:
    """A retry carries the tokens that the client has; they count as part of max_tokens, not beside it."""
    engine = make_engine(num_blocks=8)
    again = replace(request(prompt=[5] * 20, max_tokens=12), epoch=1, generated_ids=(9,) * 8)
    engine.handle(Add(again))
    tokens = run(engine, Script())
    assert [output.first_index for output in tokens] == [8, 9, 10, 11]
    assert tokens[-1].finish is FinishReason.LENGTH


def test_adding_a_running_key_again_changes_nothing() -> None:
    engine = make_engine()
    for _ in range(2):
        engine.handle(Add(request(max_tokens=3)))
    turn(engine, Script(11))
    engine.handle(Add(request(max_tokens=3)))
    assert [output.token_ids for output in run(engine, Script(12, 13))] == [(12,), (13,)]
    assert_empty(engine)


def test_adding_a_held_key_again_changes_nothing() -> None:
    engine = make_engine()
    engine.handle(Add(request(), handoff=True))
    turn(engine, Script(11))
    engine.handle(Add(request(), handoff=True))
    assert run(engine, Script(12)) == []
    engine.handle(Release(request().key))
    assert_empty(engine)


def test_another_epoch_of_a_request_is_another_sequence() -> None:
    engine = make_engine()
    engine.handle(Add(request(max_tokens=1)))
    engine.handle(Add(replace(request(max_tokens=1), epoch=1)))
    assert {output.key.epoch for output in run(engine, Script(11, 12))} == {0, 1}


# --- how a request ends ---------------------------------------------------------------------------------------

ENDS = {
    "the end token": ({}, (11, EOS), (11, EOS), FinishReason.STOP),
    "a stop token": ({"stop_token_ids": (30, 31)}, (11, 31), (11, 31), FinishReason.STOP),
    "max_tokens": ({"max_tokens": 3}, (11, 12, 13), (11, 12, 13), FinishReason.LENGTH),
    "the end token as the last of max_tokens": ({"max_tokens": 2}, (11, EOS), (11, EOS), FinishReason.STOP),
    "max_tokens past an ignored end token": (
        {"max_tokens": 3, "ignore_eos": True}, (EOS, 12, EOS), (EOS, 12, EOS), FinishReason.LENGTH
    ),
    "a stop token where the end token is ignored": (
        {"ignore_eos": True, "stop_token_ids": (31,)}, (EOS, 31), (EOS, 31), FinishReason.STOP
    ),
    "the end of the context": ({"max_tokens": 50}, (), (9,) * 7, FinishReason.LENGTH),
}  # fmt: skip


@pytest.mark.parametrize(("sampling", "script", "wanted", "reason"), ENDS.values(), ids=ENDS)
def test_a_request_ends_by(sampling, script, wanted, reason) -> None:
    engine = make_engine(max_context=10)
    engine.handle(Add(request(**sampling)))
    tokens = run(engine, Script(*script))
    assert tuple(token_id for output in tokens for token_id in output.token_ids) == wanted
    assert [output.finish for output in tokens] == [None] * (len(wanted) - 1) + [reason]
    assert [output.first_index for output in tokens] == list(range(len(wanted)))
    assert_empty(engine)


@pytest.mark.parametrize(("accepted", "wanted"), [((EOS, 12, 13), (EOS,)), ((11, 12, EOS), (11, 12, EOS))])
def test_nothing_is_told_beyond_the_token_that_ends(accepted: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """With drafts a step may bring tokens past the end."""
    engine = make_engine(lookahead=2)
    engine.handle(Add(request(max_tokens=9)))
    turn(engine, Script(8))
    batch = engine.begin()
    assert batch is not None
    engine.finish(batch, [Sampled(accepted)])
    (output,) = engine.take_outputs().tokens
    assert (output.first_index, output.token_ids, output.finish) == (1, wanted, FinishReason.STOP)
    assert_empty(engine)


# --- Abort ----------------------------------------------------------------------------------------------------


def test_aborting_an_unknown_key_is_no_error() -> None:
    engine = make_engine()
    engine.handle(Abort(Key("nobody", 0)))
    assert engine.take_outputs().tokens == ()
    assert_empty(engine)


@pytest.mark.parametrize("turns", [0, 1, 2, 4])
def test_an_abort_ends_a_sequence_wherever_it_is(turns: int) -> None:
    engine = make_engine()
    engine.handle(Add(request(prompt=[5] * 12, max_tokens=9)))
    for _ in range(turns):
        turn(engine, Script())
    engine.handle(Abort(request().key))
    (output,) = engine.take_outputs().tokens
    assert (output.token_ids, output.finish) == ((), FinishReason.ABORT)
    assert output.first_index == max(0, turns - 1)
    assert_empty(engine)


def test_an_abort_frees_a_held_hand_off_and_a_reservation() -> None:
    engine = make_engine()
    engine.handle(Add(request(), handoff=True))
    turn(engine, Script())
    reserve(engine, Key("other", 0), 9)
    assert engine.stats().num_held == 2
    engine.handle(Abort(request().key))
    engine.handle(Abort(Key("other", 0)))
    assert engine.take_outputs().tokens == ()
    assert_empty(engine)


# --- Reserve, Adopt, Release ----------------------------------------------------------------------------------


def test_a_reservation_covers_its_positions_and_the_token_that_comes_with_them() -> None:
    engine = make_engine()
    for num_tokens, num_blocks in ((1, 1), (3, 1), (4, 2), (11, 3)):
        block_ids = reserve(engine, Key(str(num_tokens), 0), num_tokens).block_ids
        assert block_ids is not None and len(set(block_ids)) == num_blocks
    assert engine.stats().num_held_blocks == 7
    assert engine.stats().num_free_blocks == 9


def test_a_reservation_is_refused_when_its_growth_would_not_fit() -> None:
    engine = make_engine(num_blocks=8)
    assert reserve(engine, Key("a", 0), 15, num_growth=16).block_ids is not None
    refused = reserve(engine, Key("b", 0), 11, num_growth=8)  # 3 + 2 of 4
    assert refused.block_ids is None
    assert refused.reason == "3+2 blocks wanted, 4 available"
    assert reserve(engine, Key("b", 0), 11, num_growth=4).block_ids is not None


@pytest.mark.parametrize("num_answers", [1, 4])
def test_an_empty_pool_takes_whatever_fits_it(num_answers: int) -> None:
    """41 tokens and 23 more are 16 blocks of 4; rounded up apart, or for each of several answers, they were more."""
    engine = make_engine(num_blocks=16)
    engine.handle(Reserve(Key("a", 0), 41, 23, num_answers))
    (reserved,) = engine.take_outputs().reserved
    assert reserved.block_ids is not None


def test_a_reservation_is_refused_while_others_wait() -> None:
    """For blocks that would not suffice for both, or for a seat."""
    engine = make_engine(num_blocks=16)
    engine.handle(Add(request("long", prompt=[5] * 40)))
    assert reserve(engine, Key("a", 0), 27).reason == "7+0 blocks wanted, 6 available"
    assert reserve(engine, Key("a", 0), 23).block_ids is not None
    engine = make_engine()
    for name in "abcde":
        engine.handle(Add(request(name)))
    engine.begin()
    assert reserve(engine, Key("f", 0), 1).reason == "sequences wait for a seat"


def test_reserving_twice_gives_the_same_blocks() -> None:
    engine = make_engine()
    assert reserve(engine, Key("a", 0), 10) == reserve(engine, Key("a", 0), 10)
    assert engine.stats().num_held_blocks == 3


def test_a_reservation_may_take_cached_blocks() -> None:
    engine = make_engine(num_blocks=8)
    engine.handle(Add(request(prompt=[5] * 20)))
    run(engine, Script())
    assert engine.stats().num_cached_blocks == 5
    assert reserve(engine, Key("a", 0), 31).block_ids is not None
    assert engine.stats().num_cached_blocks == 0


def test_releasing_twice_or_the_unknown_is_no_error() -> None:
    engine = make_engine()
    reserve(engine, Key("a", 0), 10)
    for name in ("a", "a", "nobody"):
        engine.handle(Release(Key(name, 0)))
    assert engine.take_outputs() == StepOutputs(stats=engine.stats())
    assert_empty(engine)


def test_a_release_leaves_a_running_sequence_alone() -> None:
    engine = make_engine()
    engine.handle(Add(request(max_tokens=3)))
    turn(engine, Script(11))
    engine.handle(Release(request().key))
    assert [output.token_ids for output in run(engine, Script(12, 13))] == [(12,), (13,)]


def test_an_adopted_request_goes_on_at_its_next_index() -> None:
    engine = make_engine()
    arrival = replace(request(max_tokens=3), generated_ids=(11,))
    reserve(engine, arrival.key, 3)
    engine.handle(Adopt(arrival, computed=3, cached_tokens=2))
    tokens = run(engine, Script(12, 13))
    assert [(output.first_index, output.token_ids, output.cached_tokens) for output in tokens] == [
        (1, (12,), 2),
        (2, (13,), 2),
    ]
    assert_empty(engine)


def test_an_adopted_request_may_have_more_than_one_token_to_compute() -> None:
    engine = make_engine()
    arrival = replace(request(prompt=[5] * 10), generated_ids=(11,))
    reserve(engine, arrival.key, 10)
    engine.handle(Adopt(arrival, computed=4))
    batch = engine.begin()
    assert batch is not None
    assert [(item.start, item.num_new, item.samples) for item in batch.scheduled] == [(4, 7, True)]


def test_adopting_without_a_reservation_fails() -> None:
    engine = make_engine()
    engine.handle(Adopt(replace(request(), generated_ids=(11,)), computed=3))
    assert only_error(engine) == ("transfer_failed", "no blocks are reserved for this request")
    assert_empty(engine)


@pytest.mark.parametrize(
    ("computed", "generated"), [(4, 1), (-1, 1), (3, 6)], ids=["all of them", "a negative number", "too few blocks"]
)
def test_adopting_positions_that_cannot_be_fails_and_frees_the_blocks(computed: int, generated: int) -> None:
    engine = make_engine()
    arrival = replace(request(max_tokens=9), generated_ids=(11,) * generated)
    reserve(engine, arrival.key, 3)
    engine.handle(Adopt(arrival, computed))
    assert only_error(engine)[0] == "transfer_failed"
    assert_empty(engine)


def test_adopting_a_request_that_can_never_be_computed_fails_and_frees_the_blocks() -> None:
    engine = make_engine()
    arrival = replace(request(prompt=(5, VOCAB, 7)), generated_ids=(11,))
    reserve(engine, arrival.key, 3)
    engine.handle(Adopt(arrival, computed=3))
    assert only_error(engine)[0] == "invalid_request"
    assert_empty(engine)


def test_adopting_a_running_key_again_changes_nothing() -> None:
    engine = make_engine()
    arrival = replace(request(max_tokens=3), generated_ids=(11,))
    for _ in range(2):
        reserve(engine, arrival.key, 3)
        engine.handle(Adopt(arrival, computed=3))
    engine.handle(Adopt(arrival, computed=3))
    tokens = run(engine, Script(12, 13))
    assert [(output.first_index, output.token_ids) for output in tokens] == [(1, (12,)), (2, (13,))]
    assert_empty(engine)


def test_adopting_again_fails_those_that_have_ended_since() -> None:
    """Or they would be waited for. The others go on."""
    engine = make_engine()
    short, long = (replace(request(name, max_tokens=size), generated_ids=(11,)) for name, size in (("s", 2), ("l", 4)))
    ended = ()
    for _ in range(2):
        reserve(engine, short.key, 3)
        engine.handle(Adopt(short, computed=3, siblings=(long,)))
        ended = turn(engine, Script(12, 12)) or ()
    (failed,) = [output for outputs in ended for output in outputs.tokens if output.error]
    assert failed.key == short.key
    (last,) = run(engine, Script())
    assert (last.key, last.first_index, last.finish) == (long.key, 3, FinishReason.LENGTH)
    assert_empty(engine)


# --- hand-offs ------------------------------------------------------------------------------------------------


def test_a_hand_off_is_announced_before_its_first_chunk_is_computed_and_done_with_its_first_token() -> None:
    engine = make_engine(chunk=8)
    leaving = request(prompt=range(5, 26))
    engine.handle(Add(leaving, handoff=True))
    turns = [turn(engine, Script(11)) for _ in range(3)]
    block_ids = turns[2][1].progress[0].block_ids if turns[2] else ()
    assert len(block_ids) == 6
    names: list[bytes] = []
    extend_hashes(b"key", names, root_hash(b"key", ""), leaving.prompt_ids, BLOCK)
    news = [(*before.progress, *after.progress) for before, after in filter(None, turns)]
    assert news == [
        (Progress(leaving.key, 0, (), names=tuple(names)), Progress(leaving.key, 8, block_ids[:2])),
        (Progress(leaving.key, 16, block_ids[:4]),),
        (Progress(leaving.key, 21, block_ids, done=True),),
    ]
    assert turns[0] and turns[0][0].progress == (Progress(leaving.key, 0, (), names=tuple(names)),), (
        "the announcement goes ahead"
    )
    assert [after.tokens for _, after in filter(None, turns)][:2] == [(), ()]
    assert turns[2] and turns[2][1].tokens == (TokenOutput(leaving.key, 0, (11,)),)


def test_a_hand_off_with_a_known_prefix_announces_what_is_stored_already() -> None:
    engine = make_engine()
    engine.handle(Add(request("first", prompt=[5] * 12, max_tokens=1)))
    run(engine, Script())
    engine.handle(Add(request("second", prompt=[5] * 14), handoff=True))
    outputs = turn(engine, Script(11))
    assert outputs is not None
    before, after = outputs
    assert [progress.computed for progress in (*before.progress, *after.progress)] == [12, 14]
    assert after.tokens[0].cached_tokens == 12


def test_a_hand_off_holds_its_blocks_until_release() -> None:
    engine = make_engine()
    engine.handle(Add(request(prompt=[5] * 9), handoff=True))
    for _ in range(2):
        turn(engine, Script(11))
    assert engine.begin() is None, "it is computed no further"
    stats = engine.stats()
    assert (stats.num_running, stats.num_held, stats.num_held_blocks, stats.num_leaked_blocks) == (0, 1, 3, 0)
    engine.handle(Release(request().key))
    assert_empty(engine)


def test_the_blocks_of_a_hand_off_are_not_written_while_it_is_held() -> None:
    engine = make_engine(num_blocks=8)
    engine.handle(Add(request("held", prompt=range(10, 19)), handoff=True))
    turn(engine, Script(11))
    outputs = turn(engine, Script(11))
    assert outputs is not None
    held = set(outputs[1].progress[-1].block_ids)
    engine.handle(Add(request("same", prompt=range(10, 19), max_tokens=8)))
    written: set[int] = set()
    while (batch := engine.begin()) is not None:
        for item in batch.scheduled:
            positions = range(item.start, item.start + item.num_new)
            written |= {item.sequence.block_ids[position // BLOCK] for position in positions}
        engine.finish(batch, Script().execute(batch))
    assert written and not written & held


@pytest.mark.parametrize("sampling", [{}, {"max_tokens": 1, "ignore_eos": True}], ids=["end token", "max_tokens 1"])
def test_a_hand_off_that_ends_with_its_first_token_frees_its_blocks_at_once(sampling) -> None:
    engine = make_engine()
    engine.handle(Add(request(**sampling), handoff=True))
    outputs = turn(engine, Script(EOS))
    assert outputs is not None
    assert [progress.done for progress in (*outputs[0].progress, *outputs[1].progress)] == [False]
    assert outputs[1].tokens[0].finish is not None
    assert_empty(engine)


def test_an_aborted_hand_off_reports_no_more() -> None:
    engine = make_engine(chunk=4)
    engine.handle(Add(request(prompt=[5] * 9), handoff=True))
    turn(engine, Script())
    engine.handle(Abort(request().key))
    assert engine.take_outputs().progress == ()
    assert_empty(engine)


# --- accounts -------------------------------------------------------------------------------------------------


def test_stats_tell_what_runs_waits_and_is_held() -> None:
    engine = make_engine(num_blocks=16, chunk=8)
    reserve(engine, Key("c", 0), 3)
    engine.handle(Add(request("a", prompt=[5] * 20, max_tokens=4)))
    engine.handle(Add(request("b", prompt=[6] * 44, max_tokens=4)))
    turn(engine, Script())
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_held) == (1, 1, 1)
    assert stats.num_waiting_tokens == 12 + 44
    assert (stats.num_blocks, stats.num_free_blocks, stats.num_held_blocks, stats.num_steps) == (16, 10, 1, 1)
    run(engine, Script())
    assert engine.stats().prefix_queries == 64
    assert engine.stats().prefix_hits == 0


def test_a_planted_leak_is_seen_when_the_engine_falls_idle() -> None:
    engine = make_engine()
    engine.handle(Add(request(max_tokens=2)))
    engine.blocks.allocate(Holder(HolderKind.SEQUENCE, Key("forgotten", 0)), 2)
    run(engine, Script())
    assert engine.stats().num_leaked_blocks == 2


def test_a_leak_is_told_without_being_asked_for_and_once() -> None:
    engine = make_engine()
    engine.blocks.allocate(Holder(HolderKind.SEQUENCE, Key("forgotten", 0)), 2)
    assert engine.begin() is None
    assert engine.has_outputs
    assert engine.take_outputs().stats.num_leaked_blocks == 2
    assert not engine.has_outputs


def test_a_planted_leak_is_seen_while_the_engine_is_busy() -> None:
    engine = make_engine(num_blocks=200, max_context=900)
    engine.handle(Add(request(max_tokens=3 * LEAK_CHECK_STEPS)))
    turn(engine, Script())
    engine.blocks.allocate(Holder(HolderKind.SEQUENCE, Key("forgotten", 0)), 2)
    for _ in range(LEAK_CHECK_STEPS):
        turn(engine, Script())
    assert engine.has_work
    assert engine.stats().num_leaked_blocks == 2


def test_outputs_are_given_once() -> None:
    engine = make_engine()
    engine.handle(Add(request(prompt=())))
    assert engine.has_outputs
    assert len(engine.take_outputs().tokens) == 1
    assert not engine.has_outputs
    assert engine.take_outputs().tokens == ()
