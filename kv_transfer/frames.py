"""Frames: how blocks are cut for the wire, and how the target knows that it got all of them, unhurt.

A transfer is frames 0, 1, 2, ... and one COMMIT. A frame holds the records of one plane for a range of layers and
a range of the request's blocks (counted in the request, not in any pool), with an xxh3 over its payload and what it
says of itself. The COMMIT carries the number of frames, a digest over their digests, and the HandOff. No block is
usable before it.

On one host a frame need not travel: a Place says in which blocks of the producer's pool its records lie, or where in
the ring through which that pool is read.

Wire form, little-endian: a 40-byte header, then the payload (frames), the encoded HandOff (commit), the block ids
(places) or two offsets (places in a ring).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

import xxhash

from engine.errors import FrameCorrupt
from engine.planes import CacheLayout
from engine.pool import Buffer, SharedPool
from engine.rank_pools import RankPools

_HEADER = struct.Struct("<4sBBHHHIIIQQ")  # magic, kind, 0, plane, layers[2], blocks[2], index, digest, length
HEADER_BYTES = _HEADER.size
_PLACE = struct.Struct("<IHHHII")  # index, plane, layers[2], blocks[2]
_MAGIC = b"SYF1"
_KIND_FRAME, _KIND_COMMIT, _KIND_PLACE, _KIND_STAGED = 1, 2, 3, 4
_ID_BYTES = 4
_STAGED = struct.Struct("<QQ")  # first byte in the ring, and the one after the last


@dataclass(frozen=True, slots=True)
class FrameSpec:
    """Which records a frame holds: `blocks` index the request's block list."""

    plane: int
    layers: range
    blocks: range


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame on its way; `digest` is its frame_digest."""

    index: int
    spec: FrameSpec
    payload: bytes | memoryview
    digest: int

    def verify(self) -> None:
        if frame_digest(self.index, self.spec, self.payload) != self.digest:
            raise FrameCorrupt(f"frame {self.index} does not match its digest")


@dataclass(frozen=True, slots=True)
class Commit:
    """Ends a transfer; `digest` is the xxh3-64 over the frames' digests in order and the HandOff."""

    num_frames: int
    digest: int
    handoff: bytes


@dataclass(frozen=True, slots=True)
class Place:
    """A frame that stays where it is: its records lie in these blocks of the producer's pool; or, one after the other,
    in these bytes of its ring, until its reader comes back for more."""

    index: int
    spec: FrameSpec
    block_ids: tuple[int, ...]
    digest: int
    staged: range | None = None


@dataclass(frozen=True, slots=True)
class PlacedFrame:
    """A place, and the producer's pool as it is mapped here."""

    place: Place
    source: SharedPool | RankPools


Message = Frame | PlacedFrame | Commit


def frame_digest(index: int, spec: FrameSpec, payload: Buffer) -> int:
    """xxh3-64 of the payload, seeded by the number of the frame and the records it is for."""
    return pieces_digest(index, spec, (payload,))


def pieces_digest(index: int, spec: FrameSpec, pieces: Iterable[Buffer]) -> int:
    """The same of a payload in pieces."""
    place = _PLACE.pack(index, spec.plane, spec.layers.start, spec.layers.stop, spec.blocks.start, spec.blocks.stop)
    digest = xxhash.xxh3_64(seed=xxhash.xxh3_64_intdigest(place))
    for piece in pieces:
        digest.update(piece)
    return digest.intdigest()


def commit_digest(frame_digests: list[int], handoff: bytes) -> int:
    joined = b"".join(digest.to_bytes(8, "little") for digest in frame_digests)
    return xxhash.xxh3_64_intdigest(joined + handoff)


def cut_frames(
    layout: CacheLayout, blocks: range, frame_bytes: int, slots: range | None = None
) -> list[FrameSpec]:  # fmt: skip
    """Frames of at most `frame_bytes` (or one record, if that is larger) that cover these slots (None: all) of these
    blocks once."""
    specs = []
    for index, plane in enumerate(layout.planes):
        within = range(plane.num_slots) if slots is None else slots
        num_layers = len(within)
        records = max(1, frame_bytes // plane.bytes_per_block)
        layers_per_frame = min(num_layers, max(1, records // max(1, len(blocks))))
        blocks_per_frame = max(1, min(len(blocks), records // layers_per_frame))
        for first in range(within.start, within.stop, layers_per_frame):
            layers = range(first, min(first + layers_per_frame, within.stop))
            for start in range(blocks.start, blocks.stop, blocks_per_frame):
                specs.append(FrameSpec(index, layers, range(start, min(start + blocks_per_frame, blocks.stop))))
    return specs


def payload_bytes(layout: CacheLayout, spec: FrameSpec) -> int:
    return layout.planes[spec.plane].bytes_per_block * len(spec.layers) * len(spec.blocks)


def encode(message: Frame | Place | Commit) -> bytes:
    if isinstance(message, Commit):
        header = _HEADER.pack(
            _MAGIC, _KIND_COMMIT, 0, 0, 0, 0, 0, 0, message.num_frames, message.digest, len(message.handoff)
        )
        return header + message.handoff
    if isinstance(message, Frame):
        return b"".join(
            (frame_header(message.index, message.spec, message.digest, len(message.payload)), message.payload)
        )
    kind, body = _whereabouts(message)
    return frame_header(message.index, message.spec, message.digest, len(body), kind) + body


def frame_header(index: int, spec: FrameSpec, digest: int, size_bytes: int, kind: int = _KIND_FRAME) -> bytes:
    """What stands before a payload of so many bytes."""
    return _HEADER.pack(
        _MAGIC, kind, 0, spec.plane, spec.layers.start, spec.layers.stop, spec.blocks.start, spec.blocks.stop, index,
        digest, size_bytes,
    )  # fmt: skip


def decode(data: Buffer) -> Frame | Place | Commit:
    """Raises FrameCorrupt if this is no whole message. A payload is a view of `data`, not yet verified."""
    if len(data) < HEADER_BYTES:
        raise FrameCorrupt(f"message of {len(data)} bytes is shorter than a header")
    magic, kind, unused, plane, layer0, layer1, block0, block1, index, digest, length = _HEADER.unpack_from(data)
    if kind == _KIND_COMMIT:  # its header has no use for a spec
        unused |= plane | layer0 | layer1 | block0 | block1
    if magic != _MAGIC or kind not in (_KIND_FRAME, _KIND_COMMIT, _KIND_PLACE, _KIND_STAGED) or unused:
        raise FrameCorrupt("message has an unknown header")
    body = memoryview(data)[HEADER_BYTES:]
    if len(body) != length:
        raise FrameCorrupt(f"message announces {length} bytes and has {len(body)}")
    if kind == _KIND_COMMIT:
        return Commit(index, digest, bytes(body))
    spec = FrameSpec(plane, range(layer0, layer1), range(block0, block1))
    if kind == _KIND_FRAME:
        return Frame(index, spec, body, digest)
    if kind == _KIND_STAGED:
        return Place(index, spec, (), digest, _staged(body))
    if length != _ID_BYTES * len(spec.blocks):
        raise FrameCorrupt(f"a place of {len(spec.blocks)} blocks has {length} bytes of block ids")
    return Place(index, spec, struct.unpack(f"<{len(spec.blocks)}I", body), digest)


def decode_places(data: Buffer) -> list[Place | Commit]:
    """Of one message with several, one after the other. Raises FrameCorrupt."""
    found: list[Place | Commit] = []
    rest = memoryview(data)
    while rest:
        length = _HEADER.unpack_from(rest)[-1] if len(rest) >= HEADER_BYTES else 0
        message = decode(rest[: HEADER_BYTES + length])
        if isinstance(message, Frame):
            raise FrameCorrupt(f"frame {message.index} came where its place was wanted")
        found.append(message)
        rest = rest[HEADER_BYTES + length :]
    return found


def _whereabouts(place: Place) -> tuple[int, bytes]:
    """A place's kind and body."""
    if place.staged is not None:
        return _KIND_STAGED, _STAGED.pack(place.staged.start, place.staged.stop)
    return _KIND_PLACE, struct.pack(f"<{len(place.block_ids)}I", *place.block_ids)


def _staged(body: memoryview) -> range:
    if len(body) != _STAGED.size:
        raise FrameCorrupt(f"a place in a ring has {len(body)} bytes of offsets")
    start, stop = _STAGED.unpack(body)
    if start > stop:
        raise FrameCorrupt(f"a place in a ring ends at {stop}, before it begins at {start}")
    return range(start, stop)
