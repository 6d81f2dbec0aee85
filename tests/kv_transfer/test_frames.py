from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import FrameCorrupt
from engine.planes import WIRE_VERSION, CacheLayout, Group, Plane, Split
from kv_transfer.frames import (
    HEADER_BYTES,
    Commit,
    Frame,
    FrameSpec,
    Place,
    commit_digest,
    cut_frames,
    decode,
    decode_places,
    encode,
    frame_digest,
    payload_bytes,
    pieces_digest,
)

U16, U32, U64 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 64))


@st.composite
def ranges(draw: st.DrawFn, bound: int) -> range:
    start = draw(st.integers(0, bound - 1))
    return range(start, draw(st.integers(start + 1, bound)))


SPECS = st.builds(FrameSpec, U16, ranges(2**16 - 1), ranges(2**32 - 1))
FRAMES = st.builds(Frame, U32, SPECS, st.binary(max_size=300), U64)
IDS = st.lists(U32, min_size=0, max_size=40).map(tuple)
PLACES = st.builds(
    lambda index, plane, ids, digest: Place(index, FrameSpec(plane, range(1, 3), range(5, 5 + len(ids))), ids, digest),
    U32, U16, IDS, U64,
)  # fmt: skip
STAGED = st.builds(
    lambda index, spec, digest, at: Place(index, spec, (), digest, at), U32, SPECS, U64, ranges(2**64 - 1)
)
COMMITS = st.builds(Commit, U32, U64, st.binary(max_size=300))


@st.composite
def layouts(draw: st.DrawFn) -> CacheLayout:
    """Planes of unequal record sizes and numbers of layers."""
    block_size = draw(st.sampled_from((1, 4, 16)))
    dtypes = st.sampled_from(("float32", "bfloat16", "uint8"))
    planes = tuple(
        Plane(f"p{i}", draw(st.integers(1, 5)), block_size, (draw(st.integers(1, 40)),),
              draw(dtypes), Split.REPLICATED)
        for i in range(draw(st.integers(1, 3)))
    )  # fmt: skip
    return CacheLayout(planes, block_size, (Group((0,)),))


@given(st.one_of(FRAMES, PLACES, STAGED, COMMITS))
def test_what_is_encoded_decodes_to_the_same_message(message: Frame | Place | Commit) -> None:
    assert decode(encode(message)) == message


@given(st.lists(st.one_of(PLACES, STAGED, COMMITS)), st.integers(0, 400))
def test_several_places_in_one_message_are_found_again_and_a_cut_one_is_refused(
    messages: list[Place | Commit], cut: int
) -> None:
    data = b"".join(map(encode, messages))
    assert decode_places(data) == messages
    ends = set(accumulate((len(encode(one)) for one in messages), initial=0))
    if cut < len(data) and cut not in ends:
        with pytest.raises(FrameCorrupt):
            decode_places(data[:cut])


@given(PLACES, st.integers(1, 8))
def test_a_place_with_more_or_fewer_block_ids_than_blocks_is_refused(place: Place, wrong: int) -> None:
    more = replace(place, block_ids=(*place.block_ids, *range(wrong)))
    with pytest.raises(FrameCorrupt, match="block ids"):
        decode(encode(more))


@pytest.mark.parametrize(("body", "problem"), [(b"7" * 15, "15 bytes of offsets"), (b"\x01" + bytes(15), "ends at 0")])
def test_offsets_in_a_ring_that_make_no_sense_are_refused(body: bytes, problem: str) -> None:
    data = encode(Place(0, FrameSpec(0, range(1), range(1)), (), 1, range(256)))[:HEADER_BYTES]
    with pytest.raises(FrameCorrupt, match=problem):
        decode(data[:-8] + len(body).to_bytes(8, "little") + body)


@given(st.lists(st.binary(max_size=50)))
def test_a_payload_in_pieces_has_the_digest_of_the_whole(pieces: list[bytes]) -> None:
    spec = FrameSpec(1, range(2, 4), range(5, 6))
    assert pieces_digest(7, spec, pieces) == frame_digest(7, spec, b"".join(pieces))


def test_the_bytes_on_the_wire_change_only_with_the_wire_version() -> None:
    """If this fails, raise engine.planes.WIRE_VERSION and write the new bytes here."""
    spec = FrameSpec(1, range(2, 4), range(5, 6))
    frame = Frame(7, spec, b"payload!", frame_digest(7, spec, b"payload!"))
    commit = Commit(8, commit_digest([frame.digest], b"handoff"), b"handoff")
    place = Place(9, FrameSpec(1, range(2, 4), range(5, 7)), (3, 70000), 1)
    staged = replace(place, block_ids=(), staged=range(256, 768))
    golden = {
        4: (
            "535946310100010002000400050000000600000007000000167ba1e06c8ade7f08000000000000007061796c6f616421",
            "535946310200000000000000000000000000000008000000e8265191c9126403070000000000000068616e646f6666",
            "535946310300010002000400050000000700000009000000010000000000000008000000000000000300000070110100",
            "5359463104000100020004000500000007000000090000000100000000000000100000000000000000010000000000000003000000000000",
        )
    }
    assert tuple(encode(one).hex() for one in (frame, commit, place, staged)) == golden[WIRE_VERSION]


@given(layouts(), ranges(40), st.integers(1, 4000))
def test_frames_cover_every_record_exactly_once_and_are_no_larger_than_asked(
    layout: CacheLayout, blocks: range, frame_bytes: int
) -> None:
    specs = cut_frames(layout, blocks, frame_bytes)
    records = [(spec.plane, layer, block) for spec in specs for layer in spec.layers for block in spec.blocks]
    wanted = {
        (index, layer, block)
        for index, plane in enumerate(layout.planes)
        for layer in range(plane.num_slots)
        for block in blocks
    }
    assert len(records) == len(wanted)
    assert set(records) == wanted
    for spec in specs:
        one_record = layout.planes[spec.plane].bytes_per_block
        assert 0 < payload_bytes(layout, spec) <= max(frame_bytes, one_record)


@given(layouts(), st.integers(1, 4000))
def test_no_blocks_make_no_frames(layout: CacheLayout, frame_bytes: int) -> None:
    assert cut_frames(layout, range(3, 3), frame_bytes) == []


def verified(data: bytes) -> Frame:
    frame = decode(data)
    assert isinstance(frame, Frame)
    frame.verify()
    return frame


def is_message_or_corrupt(data: bytes) -> bool:
    try:
        message = decode(data)
    except FrameCorrupt:
        return True
    return encode(message) == data


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_corrupt(data: bytes) -> None:
    assert is_message_or_corrupt(data)


@given(st.one_of(FRAMES, COMMITS), st.data())
def test_a_mutated_message_is_a_message_or_corrupt(message: Frame | Commit, data: st.DataObject) -> None:
    wire = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
    assert is_message_or_corrupt(bytes(wire))


@given(st.one_of(FRAMES, COMMITS), st.data())
def test_a_truncated_message_is_corrupt(message: Frame | Commit, data: st.DataObject) -> None:
    wire = encode(message)
    with pytest.raises(FrameCorrupt):
        decode(wire[: data.draw(st.integers(0, len(wire) - 1))])


@given(FRAMES, st.data())
def test_one_flipped_bit_of_a_frame_is_noticed_wherever_it_is(frame: Frame, data: st.DataObject) -> None:
    frame = Frame(frame.index, frame.spec, frame.payload, frame_digest(frame.index, frame.spec, frame.payload))
    wire = bytearray(encode(frame))
    at = data.draw(st.integers(0, len(wire) - 1))
    wire[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(FrameCorrupt):
        verified(bytes(wire))


def test_the_digest_of_a_frame_depends_on_the_records_that_it_is_for() -> None:
    specs = [FrameSpec(plane, range(layer, layer + 1), range(block, block + 1)) for plane in (0, 1) for layer in (0, 1)
             for block in (0, 1)]  # fmt: skip
    assert len({frame_digest(index, spec, b"same") for index in (0, 1) for spec in specs}) == 2 * len(specs)


def test_the_digest_of_a_commit_depends_on_the_order_of_frames_and_on_the_hand_off() -> None:
    digests = {
        commit_digest([1, 2], b"a"),
        commit_digest([2, 1], b"a"),
        commit_digest([1, 2], b"b"),
        commit_digest([], b""),
    }
    assert len(digests) == 4
    assert commit_digest([], b"a") == xxhash.xxh3_64_intdigest(b"a")


def test_a_header_is_as_long_as_documented() -> None:
    assert HEADER_BYTES == 40
