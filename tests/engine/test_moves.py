"""Engines between which sequences move: what is lent, kept, frozen and resumed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.engine import Engine, EngineSpec
from engine.scheduler import Scheduled, SchedulerLimits
from engine.types import (
    Abort,
    Add,
    FinishReason,
    Freeze,
    Keep,
    Key,
    Lend,
    Release,
    Request,
    Reserve,
    Resume,
    Sampled,
    SamplingParams,
)

SIZE = 4
KEY, LOAN = Key("r", 0), Key("loan", 0)
PROMPT = tuple(range(10, 20))


def engine(num_blocks: int = 16, prefix_cache: bool = True) -> Engine:
    limits = SchedulerLimits(SIZE, 64, 8, 32, prefix_cache)
    return Engine(EngineSpec(limits, num_blocks, 256, 1000, frozenset(), b"key"))


def step(one: Engine) -> None:
    """One step; each sequence that samples gets the next number."""
    batch = one.begin()
    assert batch is not None
    one.finish(batch, [_sampled(item) for item in batch.scheduled])


def _sampled(item: Scheduled) -> Sampled:
    chosen = Sampled((len(item.sequence.tokens),) if item.samples else ())
    return replace(chosen, siblings=(chosen,) * (len(item.sequence.answers) - 1))


def running(num_steps: int = 8, **kwargs: bool) -> Engine:
    """With a sequence that decodes."""
    one = engine(**kwargs)
    one.handle(Add(Request("r", PROMPT, SamplingParams(max_tokens=40))))
    for _ in range(num_steps):
        step(one)
    one.take_outputs()
    return one


def test_a_frozen_sequence_keeps_its_blocks_and_nobody_computes_it() -> None:
    one = running()
    one.handle(Freeze(KEY))
    (frozen,) = one.take_outputs().frozen
    assert frozen.request is not None
    assert frozen.request.num_tokens == len(PROMPT) + 8
    assert frozen.computed == frozen.request.num_tokens - 1
    assert len(frozen.block_ids) == -(-frozen.computed // SIZE)
    assert len(frozen.names) == frozen.computed // SIZE
    assert one.begin() is None
    stats = one.stats()
    assert (stats.num_running, stats.num_held, stats.num_leaked_blocks) == (0, 1, 0)
    one.handle(Resume(KEY))
    step(one)
    (output,) = one.take_outputs().tokens
    assert (output.first_index, output.token_ids) == (8, (len(PROMPT) + 8,))


@pytest.mark.parametrize("command", [Release(KEY), Abort(KEY)])
def test_a_frozen_sequence_that_is_let_go_leaves_only_cached_blocks(command: Release | Abort) -> None:
    one = running()
    one.handle(Freeze(KEY))
    one.handle(command)
    outputs = one.take_outputs()
    assert [output.finish for output in outputs.tokens] == [FinishReason.ABORT] * isinstance(command, Abort)
    assert one.begin() is None
    stats = one.stats()
    assert (stats.num_held, stats.num_free_blocks, stats.num_leaked_blocks) == (0, 16, 0)
    one.handle(Resume(KEY))
    assert not one.has_work, "it is gone"


def test_what_does_not_decode_cannot_freeze() -> None:
    one = engine()
    one.handle(Freeze(KEY))
    one.handle(Add(Request("r", PROMPT, SamplingParams(max_tokens=4))))
    one.handle(Freeze(KEY))
    outputs = one.take_outputs()
    assert [frozen.request for frozen in outputs.frozen] == [None, None]
    assert all(frozen.reason for frozen in outputs.frozen)
    step(one)
    assert one.take_outputs().tokens, "it goes on"


def test_answers_whose_blocks_are_still_to_be_copied_do_not_freeze() -> None:
    one = engine()
    first = Request("r", PROMPT, SamplingParams(max_tokens=8))
    other = Key("r.1", 0)
    one.handle(Add(first, siblings=(first.sibling(other, 1),)))
    step(one)
    one.handle(Freeze(other))
    (refused,) = one.take_outputs().frozen
    assert refused.request is None
    step(one)
    one.handle(Freeze(other))
    (frozen,) = one.take_outputs().frozen
    assert frozen.request is not None


def test_what_one_engine_lends_another_keeps_and_finds() -> None:
    one, two = running(), engine()
    one.handle(Lend(LOAN, of=KEY))
    (lent,) = one.take_outputs().lent
    assert len(lent.names) == len(lent.block_ids) == (len(PROMPT) + 7) // SIZE
    two.handle(Reserve(LOAN, SIZE * len(lent.names), names=lent.names))
    (reserved,) = two.take_outputs().reserved
    assert reserved.block_ids is not None
    assert reserved.present == ()
    two.handle(Keep(LOAN, lent.names))
    assert (two.stats().num_held, two.stats().num_cached_blocks) == (0, len(lent.names))
    two.handle(Reserve(KEY, len(PROMPT) + 7, names=lent.names))
    (again,) = two.take_outputs().reserved
    assert again.present == (range(0, len(lent.names)),)
    two.handle(Release(KEY))
    one.handle(Release(LOAN))
    for each in (one, two):
        each.begin()
        assert each.stats().num_leaked_blocks == 0


def test_a_prefix_is_lent_as_far_as_it_is_there() -> None:
    one = running()
    one.handle(Lend(LOAN, of=KEY))
    names = one.take_outputs().lent[0].names
    one.handle(Lend(Key("second", 0), (*names[:2], b"unknown", *names[2:])))
    (lent,) = one.take_outputs().lent
    assert lent.names == names[:2]
    one.handle(Lend(Key("third", 0), (b"unknown", *names)))
    one.handle(Lend(Key("fourth", 0), of=Key("nobody", 0)))
    assert [lent.names for lent in one.take_outputs().lent] == [(), ()]


def test_without_a_prefix_cache_nothing_is_lent_and_it_moves_whole() -> None:
    one = running(prefix_cache=False)
    one.handle(Lend(LOAN, of=KEY))
    one.handle(Freeze(KEY))
    outputs = one.take_outputs()
    assert outputs.lent[0].names == ()
    assert outputs.frozen[0].names == ()
    assert outputs.frozen[0].block_ids
