"""A pull by an owner that has some of the blocks: the others come, once and whole, and those that are there stay."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import FrameCorrupt, InvalidRequest
from engine.runs import Runs, gaps, runs_of
from kv_transfer.frames import Commit, Frame, Message, Place, cut_frames, frame_digest
from kv_transfer.pull import Puller
from tests.kv_transfer.fakes import (
    FRAME_BYTES,
    LAYOUT,
    Transfer,
    block_bytes,
    cut,
    deliver,
    handoff_of,
    once,
    transfer,
)
from tests.virtual import in_virtual_time, settle

NUM_TOKENS = 23  # 6 blocks, the last one not full
PRESENT = (range(0, 2), range(3, 4))


def put(case: Transfer, present: Runs) -> None:
    """The target has these blocks already."""
    for number in chain.from_iterable(present):
        for plane, kind in enumerate(LAYOUT.planes):
            layers = range(kind.num_slots)
            record = case.source.read(plane, layers, [case.source_ids[number]])
            case.target.write(plane, layers, [case.target_ids[number]], memoryview(record))


def num_frames(present: Runs, num_blocks: int = 6) -> int:
    return sum(len(cut_frames(LAYOUT, gap, FRAME_BYTES)) for gap in gaps(present, range(num_blocks)))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 60), st.lists(st.integers(0, 14), unique=True).map(sorted), st.integers(100, 3000),
    st.integers(1, 30), st.integers(0, 8), st.integers(0, 99),
)  # fmt: skip
@in_virtual_time
async def test_just_what_is_missing_comes(
    num_tokens: int, numbers: list[int], frame_bytes: int, chunk: int, turns: int, seed: int
) -> None:
    """Whatever is there, and whether the pull begins before or after the blocks are computed."""
    with transfer(num_tokens, frame_bytes, seed=seed) as case:
        present = runs_of(number for number in numbers if number < num_tokens // LAYOUT.block_size)
        put(case, present)
        pull = asyncio.ensure_future(case.run(present=present)) if turns < 4 else None
        for computed in range(0, num_tokens, chunk):
            case.compute(computed)
            await settle(turns)
        case.commit()
        pulled = await (pull or case.run(present=present))
        num_present = len([*chain.from_iterable(present)])
        assert pulled.handoff == handoff_of(num_tokens)
        assert pulled.saved_bytes == num_present * LAYOUT.bytes_per_block
        assert pulled.size_bytes == case.link.num_payload_bytes
        assert pulled.size_bytes + pulled.saved_bytes == len(case.target_ids) * LAYOUT.bytes_per_block
        assert all(case.arrived())
        assert case.others_untouched()


@pytest.mark.parametrize("at", range(num_frames(PRESENT) + 1))
@in_virtual_time
async def test_a_stream_cut_at_any_message_goes_on_there(at: int) -> None:
    with transfer(NUM_TOKENS, fault=once(at, cut)) as case:
        put(case, PRESENT)
        pull = asyncio.ensure_future(case.run(present=PRESENT))
        for computed in (6, 13, 20):
            case.compute(computed)
            await asyncio.sleep(0.1)
        case.commit()
        pulled = await pull
        assert case.link.pulls == [0, at]
        assert case.link.num_payload_bytes == pulled.size_bytes == 3 * LAYOUT.bytes_per_block
        assert all(case.arrived())


@in_virtual_time
async def test_an_owner_that_has_all_gets_the_commit_alone() -> None:
    with transfer(24) as case:
        put(case, (range(6),))
        case.commit()
        pulled = await case.run(present=(range(6),))
        assert (pulled.num_frames, pulled.size_bytes) == (0, 0)
        assert pulled.handoff == handoff_of(24)
        assert all(case.arrived())


@in_virtual_time
async def test_blocks_that_are_there_are_in_no_frame_and_in_no_place() -> None:
    with transfer(NUM_TOKENS) as case:
        case.commit()
        frames = [one async for one in case.outbox.messages(case.lease, 0, PRESENT) if isinstance(one, Frame)]
        messages = [one async for one in case.outbox.places(case.lease, 0, PRESENT)]
        places = [place for one in messages if isinstance(one, tuple) for place in one]
        assert [(one.index, one.spec, one.digest) for one in frames] == [
            (place.index, place.spec, place.digest) for place in places
        ]
        assert len(frames) == num_frames(PRESENT)
        covered = {number for frame in frames for number in frame.spec.blocks}
        assert covered == {2, 4, 5}
        for place in places:
            assert isinstance(place, Place)
            assert place.block_ids == case.source_ids[place.spec.blocks.start : place.spec.blocks.stop]


@pytest.mark.parametrize("other", [(), (range(0, 2),), (range(0, 4),), (range(0, 2), range(3, 5))])
@in_virtual_time
async def test_who_comes_back_with_another_list_is_refused(other: Runs) -> None:
    with transfer(NUM_TOKENS) as case:
        first = case.outbox.messages(case.lease, 0, PRESENT)
        case.commit()
        await anext(first)
        for again in (case.outbox.messages(case.lease, 0, other), case.outbox.places(case.lease, 1, other)):
            with pytest.raises(InvalidRequest) as caught:
                await anext(again)
            assert caught.value.param == "present"
        rest = [message async for message in first]
        assert len(rest) == num_frames(PRESENT), "the first one goes on"


@in_virtual_time
async def test_a_list_beyond_all_blocks_costs_nothing_and_gets_a_commit_that_covers_nothing() -> None:
    """A peer may say what it likes: only what the prompt has is looked at."""
    with transfer(NUM_TOKENS) as case:
        case.commit()
        everything = (range(0, 2**60),)
        (commit,) = [message async for message in case.outbox.messages(case.lease, 0, everything)]
        assert isinstance(commit, Commit) and commit.num_frames == 0


class Producing:
    """A carrier that sends these messages, whatever the owner says that it has."""

    name = "producing"

    def __init__(self, case: Transfer, present: Runs) -> None:
        self._case = case
        self._present = present

    async def pull(self, lease: object, first_frame: int, present: Runs = ()) -> AsyncGenerator[Message]:
        async for message in self._case.outbox.messages(self._case.lease, first_frame, self._present):
            yield message

    async def release(self, lease: object) -> None: ...

    async def renew(self, leases: object) -> None: ...


@pytest.mark.parametrize(
    ("has", "sent_for"),
    [
        (PRESENT, ()),
        (PRESENT, (range(0, 2),)),
        (PRESENT, (range(0, 4),)),
        (PRESENT, (range(0, 2), range(3, 5))),
        ((), PRESENT),
    ],
)
@in_virtual_time
async def test_frames_for_another_list_are_refused_and_what_was_there_is_never_written(
    has: Runs, sent_for: Runs
) -> None:
    with transfer(NUM_TOKENS) as case:
        before = [block_bytes(case.target, block_id) for block_id in case.target_ids]
        case.commit()
        carrier = Producing(case, sent_for)
        puller = Puller(LAYOUT, case.target, case.target_ids, carrier, case.lease, present=has)
        with pytest.raises(FrameCorrupt):
            await puller.run(1.0)
        for number in chain.from_iterable(has):
            assert block_bytes(case.target, case.target_ids[number]) == before[number]
        assert case.others_untouched()


@in_virtual_time
async def test_a_frame_that_reaches_into_a_block_that_is_there_is_refused() -> None:
    """Well formed, and with the right digest."""
    with transfer(NUM_TOKENS, fault=deliver) as case:
        case.commit()
        puller = case.puller(present=PRESENT)
        (spec, *_) = cut_frames(LAYOUT, range(2, 4), FRAME_BYTES)
        payload = case.source.read(spec.plane, spec.layers, case.source_ids[spec.blocks.start : spec.blocks.stop])
        frame = Frame(0, spec, payload, frame_digest(0, spec, payload))
        assert 3 in spec.blocks
        with pytest.raises(FrameCorrupt, match="here already"):
            puller._take(frame)
