from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import FrameCorrupt, LeaseLost, TransferFailed
from engine.runs import Runs
from engine.types import Key
from kv_transfer.frames import (
    HEADER_BYTES,
    Commit,
    Frame,
    FrameSpec,
    Message,
    commit_digest,
    cut_frames,
    encode,
    frame_digest,
    payload_bytes,
)
from kv_transfer.lease import Lease
from kv_transfer.pull import FIRST_PAUSE_S, MAX_RESUMES, Puller
from tests.kv_transfer.fakes import (
    FRAME_BYTES,
    KEY,
    LAYOUT,
    NUM_BLOCKS,
    TTL_S,
    Transfer,
    cut,
    flip,
    handoff_of,
    is_commit,
    once,
    transfer,
)
from tests.virtual import in_virtual_time, settle

NUM_TOKENS = 15  # 4 blocks, the last one not full
NUM_FRAMES = len(cut_frames(LAYOUT, range(4), FRAME_BYTES))
NUM_MESSAGES = NUM_FRAMES + 1
WIRE_BYTES = HEADER_BYTES + FRAME_BYTES  # of every frame

Change = Callable[[bytes], Sequence[bytes]]


def ready(case: Transfer) -> Transfer:
    case.commit()
    return case


async def fails(case: Transfer, kind: type[TransferFailed] = TransferFailed) -> None:
    """The pull fails with this, and has written nowhere else."""
    with pytest.raises(kind):
        await case.run()
    assert case.others_untouched()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(100, 3000), st.integers(1, 30), st.integers(0, 99))
@in_virtual_time
async def test_what_arrives_equals_what_was_sent(num_tokens: int, frame_bytes: int, chunk: int, seed: int) -> None:
    with transfer(num_tokens, frame_bytes, seed=seed) as case:
        pull = asyncio.ensure_future(case.run())
        for computed in range(0, num_tokens, chunk):
            case.compute(computed)
            await settle(3)
        case.commit()
        pulled = await pull
        assert pulled.handoff == handoff_of(num_tokens)
        assert pulled.num_resumes == 0
        assert pulled.size_bytes == len(case.target_ids) * LAYOUT.bytes_per_block == case.link.num_payload_bytes
        assert all(case.arrived())
        assert case.others_untouched()


@in_virtual_time
async def test_blocks_arrive_while_later_ones_are_computed() -> None:
    with transfer(NUM_TOKENS) as case:
        pull = asyncio.ensure_future(case.run())
        await settle()
        assert case.arrived() == [False] * 4
        case.compute(9)
        await settle(100)
        assert case.arrived() == [True, True, False, False]
        case.compute(12)
        await settle(100)
        assert case.arrived() == [True] * 3 + [False]
        assert not pull.done()
        case.commit()
        await pull
        assert all(case.arrived())


@pytest.mark.parametrize("at", range(NUM_MESSAGES))
@in_virtual_time
async def test_a_stream_cut_at_any_message_goes_on_there_and_sends_nothing_again(at: int) -> None:
    with transfer(NUM_TOKENS, fault=once(at, cut)) as case:
        pulled = await ready(case).run()
        assert case.link.pulls == [0, at]
        assert pulled.num_resumes == 1
        assert case.link.num_payload_bytes == pulled.size_bytes
        assert all(case.arrived())
        assert case.others_untouched()


@in_virtual_time
async def test_as_many_cuts_as_allowed_are_survived() -> None:
    with transfer(NUM_TOKENS, fault=lambda at, data: cut(data) if at in range(2, 2 + MAX_RESUMES) else [data]) as case:
        assert (await ready(case).run()).num_resumes == MAX_RESUMES
        assert all(case.arrived())


@in_virtual_time
async def test_one_cut_more_fails_the_pull() -> None:
    with transfer(NUM_TOKENS, fault=lambda at, data: cut(data) if at >= 2 else [data]) as case:
        await fails(ready(case))
        assert case.link.pulls == [0] + [2] * MAX_RESUMES


@settings(max_examples=60, deadline=None)
@given(st.integers(0, NUM_FRAMES - 1), st.integers(0, WIRE_BYTES - 1).filter(lambda at: at != 5), st.integers(0, 7))
@in_virtual_time
async def test_one_flipped_bit_of_any_frame_is_seen_and_the_frame_sent_again(at: int, offset: int, bit: int) -> None:
    with transfer(NUM_TOKENS, fault=once(at, flip(offset, bit))) as case:
        pulled = await ready(case).run()
        assert case.link.pulls == [0, at]
        assert pulled.num_resumes == 1
        assert all(case.arrived())
        assert case.others_untouched()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 7))
@in_virtual_time
async def test_one_flipped_bit_of_the_commit_never_changes_the_hand_off(offset: int, bit: int) -> None:
    with transfer(NUM_TOKENS, fault=once(NUM_FRAMES, flip(offset, bit))) as case:
        assert (await ready(case).run()).handoff == handoff_of(NUM_TOKENS)
        assert all(case.arrived())


@in_virtual_time
async def test_a_frame_that_is_always_corrupt_fails_the_pull_and_is_never_written() -> None:
    with transfer(NUM_TOKENS, fault=lambda at, data: [data] if is_commit(data) else flip(-1)(data)) as case:
        await fails(ready(case), FrameCorrupt)
        assert not any(case.arrived())
        assert len(case.link.pulls) == MAX_RESUMES + 1


@in_virtual_time
async def test_without_digests_a_flipped_bit_goes_unseen() -> None:
    """What kv_transfer.digests: false gives up."""
    with transfer(NUM_TOKENS, fault=once(0, flip(-1))) as case:
        await ready(case).run(verify_digests=False)
        assert not all(case.arrived())


@pytest.mark.parametrize(
    "change",
    [
        lambda data: [data[:-1]],
        lambda data: [data[:20]],
        lambda data: [b""],
        lambda data: [],
        lambda data: [data, data],
    ],
    ids=["truncated by a byte", "truncated in the header", "emptied", "lost", "doubled"],
)
@pytest.mark.parametrize("at", [0, 7, NUM_FRAMES - 1])
@in_virtual_time
async def test_a_message_hurt_once_costs_one_resume(at: int, change: Change) -> None:
    with transfer(NUM_TOKENS, fault=once(at, change)) as case:
        pulled = await ready(case).run()
        assert pulled.num_resumes == 1
        assert all(case.arrived())


@in_virtual_time
async def test_two_frames_that_change_places_cost_one_resume() -> None:
    kept: list[bytes] = []

    def swap(at: int, data: bytes) -> Sequence[bytes]:
        if at == 3:
            kept.append(data)
            return []
        return [data, kept.pop()] if at == 4 else [data]

    with transfer(NUM_TOKENS, fault=swap) as case:
        pulled = await ready(case).run()
        assert case.link.pulls == [0, 3]
        assert pulled.num_resumes == 1
        assert all(case.arrived())


@in_virtual_time
async def test_a_lost_commit_is_asked_for_again_without_any_frame() -> None:
    with transfer(NUM_TOKENS, fault=once(NUM_FRAMES, lambda _: [])) as case:
        await ready(case).run()
        assert case.link.pulls == [0, NUM_FRAMES]
        assert case.link.num_messages == NUM_MESSAGES + 1


@in_virtual_time
async def test_silence_counts_as_a_broken_stream() -> None:
    with transfer(NUM_TOKENS) as case:
        case.compute(NUM_TOKENS)  # and the COMMIT never comes
        begun = asyncio.get_running_loop().time()
        with pytest.raises(TransferFailed, match="nothing came for 2 s"):
            await case.run(timeout_s=2.0)
        assert asyncio.get_running_loop().time() - begun == pytest.approx(2.0 * (MAX_RESUMES + 1) + 7 * FIRST_PAUSE_S)
        num_sent = len(cut_frames(LAYOUT, range(3), FRAME_BYTES))
        assert case.link.pulls == [0] + [num_sent] * MAX_RESUMES


@in_virtual_time
async def test_a_slow_stream_is_not_silent() -> None:
    with transfer(NUM_TOKENS) as case:
        pull = asyncio.ensure_future(case.run(timeout_s=2.0))
        for computed in range(4, NUM_TOKENS, 4):
            await asyncio.sleep(1.9)
            case.compute(computed)
        await asyncio.sleep(1.9)
        case.commit()
        assert (await pull).num_resumes == 0


@in_virtual_time
async def test_a_lease_that_ends_while_we_wait_fails_the_pull_at_once() -> None:
    with transfer(NUM_TOKENS) as case:
        pull = asyncio.ensure_future(case.run(timeout_s=100.0))
        case.compute(9)
        await asyncio.sleep(TTL_S)
        case.outbox.expire()
        with pytest.raises(LeaseLost):
            await pull
        assert case.link.pulls == [0]
        assert case.others_untouched()


@in_virtual_time
async def test_a_lease_that_is_not_known_is_not_tried_again() -> None:
    with transfer(NUM_TOKENS) as case:
        case.lease = replace(case.lease, secret="another")
        await fails(ready(case), LeaseLost)
        assert case.link.pulls == [0]


@in_virtual_time
async def test_a_cancelled_pull_writes_nothing_more() -> None:
    with transfer(NUM_TOKENS) as case:
        pull = asyncio.ensure_future(case.run())
        case.compute(9)
        await settle(100)
        pull.cancel()
        with suppress(asyncio.CancelledError):
            await pull
        before = bytes(case.target.memory)
        case.commit()
        await settle(100)
        assert bytes(case.target.memory) == before


# --- a producer that is wrong, though every digest is right ---------------------------------------------------


@dataclass(eq=False)
class Script:
    """A Carrier that sends these messages at every pull, from the frame asked for."""

    messages: Sequence[Message]
    name: str = "script"

    async def pull(self, lease: Lease, first_frame: int, present: Runs = ()) -> AsyncGenerator[Message]:
        for message in self.messages[first_frame:]:
            await asyncio.sleep(0)
            yield message

    async def release(self, lease: Lease) -> None: ...

    async def renew(self, leases: Sequence[Lease]) -> None: ...


def frame_of(index: int, spec: FrameSpec, size: int | None = None) -> Frame:
    payload = bytes([index + 1]) * (payload_bytes(LAYOUT, spec) if size is None else size)
    return Frame(index, spec, payload, frame_digest(index, spec, payload))


def closed_by_commit(specs: Sequence[FrameSpec], handoff: bytes = handoff_of(NUM_TOKENS).encode()) -> list[Message]:
    frames = [frame_of(index, spec) for index, spec in enumerate(specs)]
    return [*frames, Commit(len(frames), commit_digest([frame.digest for frame in frames], handoff), handoff)]


async def refused(messages: Sequence[Message]) -> None:
    with transfer(NUM_TOKENS) as case:
        puller = Puller(LAYOUT, case.target, case.target_ids, Script(messages), case.lease)
        with pytest.raises(TransferFailed):
            await puller.run(1.0)
        assert case.others_untouched()


WHOLE = cut_frames(LAYOUT, range(4), FRAME_BYTES)


@in_virtual_time
async def test_the_script_itself_is_taken_when_it_is_right() -> None:
    with transfer(NUM_TOKENS) as case:
        pulled = await Puller(LAYOUT, case.target, case.target_ids, Script(closed_by_commit(WHOLE)), case.lease).run(
            1.0
        )
        assert pulled.num_frames == NUM_FRAMES


@pytest.mark.parametrize(
    "spec",
    [
        FrameSpec(2, range(0, 1), range(0, 1)),
        FrameSpec(0, range(0, 4), range(0, 1)),
        FrameSpec(0, range(3, 4), range(0, 1)),
        FrameSpec(0, range(0, 1), range(3, 5)),
        FrameSpec(0, range(0, 1), range(4, 5)),
        FrameSpec(0, range(0, 1), range(2**31, 2**31 + 1)),
        FrameSpec(0, range(1, 1), range(0, 1)),
        FrameSpec(0, range(2, 1), range(0, 1)),
        FrameSpec(0, range(0, 1), range(2, 1)),
    ],
    ids="plane layers layer blocks block huge nothing backwards blocks-backwards".split(),
)
@in_virtual_time
async def test_a_frame_outside_of_planes_layers_or_reservation_is_refused(spec: FrameSpec) -> None:
    frame = Frame(0, spec, bytes(128), frame_digest(0, spec, bytes(128))) if spec.plane < 2 else frame_of(0, spec, 128)
    await refused([frame, *closed_by_commit(WHOLE)[1:]])


@pytest.mark.parametrize("size", [0, 1, FRAME_BYTES - 1, FRAME_BYTES + 1, 2 * FRAME_BYTES])
@in_virtual_time
async def test_a_payload_of_another_length_than_its_records_is_refused(size: int) -> None:
    await refused([frame_of(0, WHOLE[0], size), *closed_by_commit(WHOLE)[1:]])


@in_virtual_time
async def test_records_that_come_twice_do_not_stand_for_those_that_never_came() -> None:
    await refused(closed_by_commit([*WHOLE[:-1], WHOLE[0]]))


@in_virtual_time
async def test_records_that_come_once_more_than_needed_are_refused() -> None:
    await refused(closed_by_commit([*WHOLE, WHOLE[0]]))


@in_virtual_time
async def test_a_commit_before_all_has_come_is_refused() -> None:
    await refused(closed_by_commit(WHOLE[:-1]))


@in_virtual_time
async def test_a_commit_of_fewer_blocks_than_came_is_refused() -> None:
    await refused(closed_by_commit(WHOLE, handoff_of(NUM_TOKENS - 4).encode()))


@in_virtual_time
async def test_a_commit_of_more_blocks_than_were_reserved_is_refused() -> None:
    await refused(closed_by_commit(WHOLE, handoff_of(NUM_TOKENS + 4).encode()))


@in_virtual_time
async def test_a_commit_for_another_request_or_epoch_is_refused() -> None:
    for key in (Key("another", KEY.epoch), Key(KEY.request_id, KEY.epoch + 1)):
        await refused(closed_by_commit(WHOLE, handoff_of(NUM_TOKENS, key).encode()))


@in_virtual_time
async def test_a_reservation_with_room_for_more_keeps_the_rest_untouched() -> None:
    with transfer(NUM_TOKENS) as case:
        spare = next(block for block in range(NUM_BLOCKS) if block not in case.target_ids)
        await Puller(LAYOUT, case.target, (*case.target_ids, spare), case.link, ready(case).lease).run(1.0)
        assert all(case.arrived())
        assert case.others_untouched()


@in_virtual_time
async def test_a_commit_with_a_wrong_digest_or_count_is_refused() -> None:
    *frames, commit = closed_by_commit(WHOLE)
    assert isinstance(commit, Commit)
    for wrong in (replace(commit, digest=commit.digest ^ 1), replace(commit, num_frames=commit.num_frames + 1)):
        await refused([*frames, wrong])


@in_virtual_time
async def test_a_commit_whose_hand_off_is_junk_is_refused() -> None:
    await refused(closed_by_commit(WHOLE, b"junk"))


def test_the_frames_of_these_tests_have_the_wire_size_that_they_think() -> None:
    assert {len(encode(frame_of(index, spec))) for index, spec in enumerate(WHOLE)} == {WIRE_BYTES}
