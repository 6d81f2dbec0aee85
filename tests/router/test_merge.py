"""Outputs that wait are merged: the same tokens in the same order, in fewer pieces."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import WorkerLost
from engine.types import FinishReason, Key, KvTransfer, TokenLogprob, TokenOutput
from router.merge import MAX_MERGED_TOKENS, Backlog, merge

KEY = Key("r", 0)


def outputs_of(sizes: list[int], finish: FinishReason | None = None) -> list[TokenOutput]:
    """Contiguous outputs of so many tokens each, all with logprobs; the last one ends."""
    made, first = list[TokenOutput](), 0
    for size in sizes:
        ids = tuple(range(first, first + size))
        logprobs = tuple(TokenLogprob(-float(one), 1) for one in ids)
        made.append(TokenOutput(KEY, first, ids, None, None, 3, (("step", 0.5),), logprobs))
        first += size
    last = made.pop()
    return [*made, TokenOutput(KEY, last.first_index, last.token_ids, finish, None, 3, last.stages, last.logprobs)]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.sampled_from([None, *FinishReason]))
def test_merged_outputs_say_the_same(sizes: list[int], finish: FinishReason | None) -> None:
    outputs = outputs_of(sizes, finish)
    one = merge(outputs)
    assert one.token_ids == tuple(range(sum(sizes)))
    assert [logprob.logprob for logprob in one.logprobs] == [-float(index) for index in one.token_ids]
    assert (one.key, one.first_index, one.finish, one.cached_tokens) == (KEY, 0, finish, 3)
    assert one.stages == (("step", 0.5),) * len(sizes)


def test_the_prompts_logprobs_are_kept() -> None:
    scored = (TokenLogprob(-1.0, 2, ((5, -0.5),)),)
    first = TokenOutput(KEY, 0, (7,), prompt_logprobs=scored)
    assert merge([first, TokenOutput(KEY, 1, (8,))]).prompt_logprobs == scored


def test_the_transfer_that_one_of_them_tells_of_is_kept() -> None:
    transfer = KvTransfer("shm", 10, 5, 1.0, 0.5)
    outputs = [TokenOutput(KEY, 0, (7,)), TokenOutput(KEY, 1, (8,), transfer=transfer), TokenOutput(KEY, 2, (9,))]
    assert merge(outputs).transfer == transfer


def test_a_gap_or_another_epoch_is_never_merged() -> None:
    first = TokenOutput(KEY, 0, (1,))
    ended = TokenOutput(KEY, 0, (1,), FinishReason.STOP)
    for left, right in [
        (first, TokenOutput(KEY, 2, (1,))),
        (first, TokenOutput(Key("r", 1), 1, (1,))),
        (ended, TokenOutput(KEY, 1, (1,))),
    ]:
        with pytest.raises(AssertionError):
            merge([left, right])


async def test_a_reader_that_keeps_up_gets_each_output_as_it_came() -> None:
    backlog = Backlog()
    for output in outputs_of([1, 2, 1]):
        backlog.put_nowait(output)
        assert await backlog.get() is output


async def test_a_reader_that_fell_behind_gets_what_waits_in_pieces_of_bounded_size() -> None:
    backlog = Backlog()
    for output in outputs_of([1] * 600, FinishReason.LENGTH):
        backlog.put_nowait(output)
    pieces = [await backlog.get() for _ in range(3)]
    assert all(isinstance(piece, TokenOutput) for piece in pieces)
    sizes = [len(piece.token_ids) for piece in pieces if isinstance(piece, TokenOutput)]
    assert sizes == [MAX_MERGED_TOKENS, MAX_MERGED_TOKENS, 600 - 2 * MAX_MERGED_TOKENS]


async def test_an_error_comes_in_its_place() -> None:
    backlog, lost = Backlog(), WorkerLost("gone")
    for event in (*outputs_of([1, 1]), lost):
        backlog.put_nowait(event)
    output = await backlog.get()
    assert isinstance(output, TokenOutput) and output.token_ids == (0, 1)
    assert await backlog.get() is lost


async def test_a_reader_waits_for_what_comes_and_may_give_up_waiting() -> None:
    backlog = Backlog()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await backlog.get()
    reading = asyncio.create_task(backlog.get())
    await asyncio.sleep(0)
    (output,) = outputs_of([2])
    backlog.put_nowait(output)
    assert await reading is output
