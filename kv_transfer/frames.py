"""Frames: how blocks are cut for the wire, and how the target knows that it got all of them, unhurt.

A transfer is frames 0, 1, 2, ... and one COMMIT. A frame holds the records of one plane for a range of layers and
a range of the request's blocks (counted in the request, not in any pool), with an xxh3 over its payload and what it
says of itself. The COMMIT carries the number of frames, a digest over their digests, and the HandOff. No block is
usable before it.

Wire form, little-endian: a 40-byte header, then the payload (frames) or the encoded HandOff (commit).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import xxhash

from engine.errors import FrameCorrupt
from engine.planes import CacheLayout

_HEADER = struct.Struct("<4sBxHHHIIIQQ")  # magic, kind, plane, layers[2], blocks[2], index, digest, length
HEADER_BYTES = _HEADER.size
_PLACE = struct.Struct("<IHHHII")  # index, plane, layers[2], blocks[2]
_MAGIC = b"SYF1"
_KIND_FRAME, _KIND_COMMIT = 1, 2


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


Message = Frame | Commit


def frame_digest(index: int, spec: FrameSpec, payload: bytes | memoryview) -> int:
    """xxh3-64 of the payload, seeded by the number of the frame and the records it is for."""
    place = _PLACE.pack(index, spec.plane, spec.layers.start, spec.layers.stop, spec.blocks.start, spec.blocks.stop)
    return xxhash.xxh3_64_intdigest(payload, seed=xxhash.xxh3_64_intdigest(place))


def commit_digest(frame_digests: list[int], handoff: bytes) -> int:
    joined = b"".join(digest.to_bytes(8, "little") for digest in frame_digests)
    return xxhash.xxh3_64_intdigest(joined + handoff)


def cut_frames(layout: CacheLayout, blocks: range, frame_bytes: int) -> list[FrameSpec]:
    """Frames of at most `frame_bytes` (or one record, if that is larger) that cover these blocks once."""
    specs = []
    for index, plane in enumerate(layout.planes):
        num_layers = plane.num_slots
        records = max(1, frame_bytes // plane.bytes_per_block)
        layers_per_frame = min(num_layers, max(1, records // max(1, len(blocks))))
        blocks_per_frame = max(1, min(len(blocks), records // layers_per_frame))
        for first in range(0, num_layers, layers_per_frame):
            layers = range(first, min(first + layers_per_frame, num_layers))
            for start in range(blocks.start, blocks.stop, blocks_per_frame):
                specs.append(FrameSpec(index, layers, range(start, min(start + blocks_per_frame, blocks.stop))))
    return specs


def payload_bytes(layout: CacheLayout, spec: FrameSpec) -> int:
    return layout.planes[spec.plane].bytes_per_block * len(spec.layers) * len(spec.blocks)


def encode(message: Message) -> bytes:
    if isinstance(message, Commit):
        header = _HEADER.pack(
            _MAGIC, _KIND_COMMIT, 0, 0, 0, 0, 0, message.num_frames, message.digest, len(message.handoff)
        )
        return header + message.handoff
    spec = message.spec
    header = _HEADER.pack(
        _MAGIC, _KIND_FRAME, spec.plane, spec.layers.start, spec.layers.stop, spec.blocks.start, spec.blocks.stop,
        message.index, message.digest, len(message.payload),
    )  # fmt: skip
    return b"".join((header, message.payload))


def decode(data: bytes) -> Message:
    """Raises FrameCorrupt if this is no whole message. The payload is a view of `data`, not yet verified."""
    if len(data) < HEADER_BYTES:
        raise FrameCorrupt(f"message of {len(data)} bytes is shorter than a header")
    magic, kind, plane, layer0, layer1, block0, block1, index, digest, length = _HEADER.unpack_from(data)
    if magic != _MAGIC or kind not in (_KIND_FRAME, _KIND_COMMIT):
        raise FrameCorrupt("message has an unknown header")
    body = memoryview(data)[HEADER_BYTES:]
    if len(body) != length:
        raise FrameCorrupt(f"message announces {length} bytes and has {len(body)}")
    if kind == _KIND_COMMIT:
        return Commit(index, digest, bytes(body))
    return Frame(index, FrameSpec(plane, range(layer0, layer1), range(block0, block1)), body, digest)
