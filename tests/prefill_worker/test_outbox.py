from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest

from engine.errors import FrameCorrupt, LeaseLost
from engine.types import Key
from kv_transfer.frames import Commit, Frame, Message, commit_digest, cut_frames
from tests.kv_transfer.fakes import FRAME_BYTES, KEY, LAYOUT, PRODUCER, TTL_S, handoff_of, transfer
from tests.virtual import in_virtual_time, settle


def frames_of(*chunks: range) -> int:
    """Number of frames when these blocks become readable one chunk after another."""
    return sum(len(cut_frames(LAYOUT, chunk, FRAME_BYTES)) for chunk in chunks)


async def read(stream: AsyncGenerator[Message], into: list[Message]) -> None:
    async for message in stream:
        into.append(message)


@in_virtual_time
async def test_a_lease_names_its_producer_and_has_a_secret() -> None:
    with transfer() as case:
        lease = case.lease
        assert (lease.key, lease.secret) == (KEY, "secret")
        assert (lease.worker_id, lease.incarnation, lease.address, lease.cohort) == (
            PRODUCER.worker_id, PRODUCER.incarnation, PRODUCER.address, PRODUCER.cohort,
        )  # fmt: skip
        assert case.outbox.num_leases == 1


@in_virtual_time
async def test_a_reader_gets_frames_chunk_by_chunk_and_only_of_full_blocks() -> None:
    with transfer(num_tokens=18) as case:
        got: list[Message] = []
        reader = asyncio.ensure_future(read(case.outbox.messages(case.lease, 0), got))
        await settle()
        assert got == []
        case.compute(3)
        await settle()
        assert got == []
        case.compute(11)
        await settle()
        assert len(got) == frames_of(range(2))
        case.compute(11)
        await settle()
        assert len(got) == frames_of(range(2))
        case.commit()
        await reader
        *frames, commit = got
        assert len(frames) == frames_of(range(2), range(2, 5))
        assert isinstance(commit, Commit)
        assert all(isinstance(frame, Frame) for frame in frames)


@in_virtual_time
async def test_frames_are_numbered_carry_the_pools_bytes_and_are_closed_by_a_commit_over_all() -> None:
    with transfer(num_tokens=18) as case:
        case.compute(9)
        case.commit()
        *frames, commit = [message async for message in case.outbox.messages(case.lease, 0)]
        assert isinstance(commit, Commit)
        for index, frame in enumerate(frames):
            assert isinstance(frame, Frame)
            frame.verify()
            assert frame.index == index
            block_ids = case.source_ids[frame.spec.blocks.start : frame.spec.blocks.stop]
            assert frame.payload == case.source.read(frame.spec.plane, frame.spec.layers, block_ids)
        handoff = handoff_of(18).encode()
        digests = [frame.digest for frame in frames if isinstance(frame, Frame)]
        assert commit == Commit(len(frames), commit_digest(digests, handoff), handoff)


@in_virtual_time
async def test_a_reader_that_comes_back_gets_the_rest_and_the_same_commit() -> None:
    with transfer(num_tokens=18) as case:
        case.commit()
        whole = [message async for message in case.outbox.messages(case.lease, 0)]
        for first in range(len(whole)):
            assert [message async for message in case.outbox.messages(case.lease, first)] == whole[first:]


@in_virtual_time
async def test_two_readers_at_different_places_do_not_disturb_each_other() -> None:
    with transfer(num_tokens=18) as case:
        case.compute(18)
        slow, fast = (case.outbox.messages(case.lease, 0) for _ in range(2))
        first = await anext(slow)
        got: list[Message] = []
        reader = asyncio.ensure_future(read(fast, got))
        await settle(50)
        case.commit()
        await reader
        assert [first, *[message async for message in slow]] == got


@in_virtual_time
async def test_a_frame_beyond_what_was_sent_is_refused() -> None:
    with transfer() as case:
        case.commit()
        with pytest.raises(FrameCorrupt):
            await anext(case.outbox.messages(case.lease, 1))


@in_virtual_time
async def test_an_unknown_key_or_a_wrong_secret_gets_nothing() -> None:
    with transfer() as case:
        case.commit()
        for wrong in (replace(case.lease, secret="guess"), replace(case.lease, key=Key("r", 1))):
            with pytest.raises(LeaseLost):
                await anext(case.outbox.messages(wrong, 0))
            case.outbox.release(wrong)
        assert (case.outbox.num_leases, case.ended) == (1, [])


@pytest.mark.parametrize("end", ["close", "release", "expire"])
@in_virtual_time
async def test_whoever_ends_a_lease_wakes_all_readers_with_lease_lost(end: str) -> None:
    with transfer(num_tokens=18) as case:
        case.compute(9)
        readers = [asyncio.ensure_future(read(case.outbox.messages(case.lease, 0), [])) for _ in range(2)]
        await settle(50)
        if end == "expire":
            await asyncio.sleep(TTL_S)
            assert case.outbox.expire() == [KEY]
        elif end == "release":
            case.outbox.release(case.lease)
        else:
            case.outbox.close(KEY)
        results = await asyncio.gather(*readers, return_exceptions=True)
        assert [type(result) for result in results] == [LeaseLost, LeaseLost]
        assert case.outbox.num_leases == 0


@in_virtual_time
async def test_a_reader_in_the_middle_of_the_frames_gets_none_after_the_end() -> None:
    with transfer(num_tokens=18) as case:
        case.commit()
        stream = case.outbox.messages(case.lease, 0)
        await anext(stream)
        case.outbox.close(KEY)
        with pytest.raises(LeaseLost):
            await anext(stream)


@in_virtual_time
async def test_the_end_is_told_once_however_often_it_is_asked_for() -> None:
    with transfer() as case:
        case.outbox.release(case.lease)
        case.outbox.release(case.lease)
        await asyncio.sleep(TTL_S)
        case.outbox.expire()
        case.outbox.close(KEY)
        assert case.ended == [KEY]


@in_virtual_time
async def test_the_producer_is_not_told_of_what_it_closed_itself() -> None:
    with transfer() as case:
        case.outbox.close(KEY)
        case.outbox.close(KEY)
        assert (case.ended, case.outbox.expire()) == ([], [])


@in_virtual_time
async def test_a_lease_ends_only_after_silence() -> None:
    with transfer() as case:
        for _ in range(10):
            await asyncio.sleep(0.9 * TTL_S)
            assert case.outbox.expire() == []
            case.outbox.renew([case.lease])
        await asyncio.sleep(TTL_S)
        assert case.outbox.expire() == [KEY]
        assert case.ended == [KEY]


@in_virtual_time
async def test_a_stranger_cannot_keep_a_lease_alive() -> None:
    with transfer() as case:
        await asyncio.sleep(0.9 * TTL_S)
        case.outbox.renew([replace(case.lease, secret="guess"), replace(case.lease, key=Key("x", 0))])
        await asyncio.sleep(0.1 * TTL_S)
        assert case.outbox.expire() == [KEY]


@in_virtual_time
async def test_news_of_a_lease_that_is_gone_is_no_error() -> None:
    with transfer() as case:
        case.outbox.close(KEY)
        case.compute(8)
        case.commit()
        assert case.outbox.num_leases == 0
