"""The consumer's half of a transfer: pull frames, verify, write them into reserved blocks, take the COMMIT.

1. open the stream at the first frame that is missing, and say which blocks are here already;
2. each frame: right index, known plane, inside the reservation and of no record that is here already, right length,
   right digest; only then written. One that is copied from the producer's pool is checked where it has arrived;
3. a broken link or a bad frame reopens the stream there, at most MAX_RESUMES times in all;
4. the COMMIT must count all frames, match the digest over theirs, and cover every byte that was missing; then the
   HandOff is returned.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np

from engine.block_table import transfer_entries
from engine.errors import FrameCorrupt, LeaseLost, TransferFailed
from engine.planes import CacheLayout
from engine.pool import BlockBytes
from engine.runs import Runs
from engine.types import Key
from kv_transfer.carrier import Carrier
from kv_transfer.copying import copy_frame
from kv_transfer.frames import Commit, Frame, FrameSpec, PlacedFrame, commit_digest, payload_bytes, pieces_digest
from kv_transfer.handoff import HandOff
from kv_transfer.lease import Lease

MAX_RESUMES = 3
FIRST_PAUSE_S = 0.05  # before a resume, doubled at each


@dataclass(frozen=True, slots=True)
class Pulled:
    """A finished transfer. A loan comes without a hand-off."""

    handoff: HandOff | None
    size_bytes: int
    num_frames: int
    num_resumes: int
    carrier: str  # which brought the last of it
    saved_bytes: int = 0  # of blocks that were here already
    hidden_bytes: int = 0  # that had arrived when the first token was sampled
    transfer_s: float = 0.0  # from the first frame to the COMMIT
    exposed_s: float = 0.0  # of these, after the first token was sampled


class Puller:
    """Pulls one lease into these blocks of this pool."""

    def __init__(
        self, layout: CacheLayout, pool: BlockBytes, block_ids: Sequence[int], carrier: Carrier, lease: Lease,
        verify_digests: bool = True, siblings: Sequence[Key] = (), present: Runs = (), num_lent: int | None = None,
    ) -> None:  # fmt: skip
        """`siblings`: whom the hand-off may be for, beside the one that names the lease. `present`: which of the blocks
        are here already; they are read by others and never written to. `num_lent`: how many blocks a loan has."""
        self._layout = layout
        self._pool = pool
        self._block_ids = block_ids
        self._carrier = carrier
        self._lease = lease
        self._keys = (lease.key, *siblings)
        self._verify_digests = verify_digests
        self._num_lent = num_lent
        self._digests: list[int] = []
        self._size_bytes = 0
        self._arrivals: list[tuple[float, int]] = []  # of each frame, when it was written, and all bytes by then
        self._present = present
        self._is_present = np.zeros(len(block_ids), dtype=bool)
        for run in present:
            self._is_present[run.start : run.stop] = True
        # Of each plane, which records are here: [num_layers, num_blocks]
        self._came = [np.tile(self._is_present, (plane.num_slots, 1)) for plane in layout.planes]

    async def run(self, timeout_s: float) -> Pulled:
        """Raises TransferFailed (or its kinds) when the blocks could not be had, whole and verified. A stream on
        which nothing comes for `timeout_s` counts as broken."""
        for num_resumes in range(MAX_RESUMES + 1):
            try:
                return self._pulled(await self._pull_once(timeout_s), num_resumes)
            except LeaseLost:
                raise
            except TransferFailed:
                if num_resumes == MAX_RESUMES:
                    raise
            await asyncio.sleep(FIRST_PAUSE_S * 2**num_resumes)  # a peer that has just been cut off may come back
        raise AssertionError("the last try returns or raises")

    def _pulled(self, handoff: HandOff | None, num_resumes: int) -> Pulled:
        """The COMMIT has just come. When the first token was sampled is known by the producer's clock, counted from
        when the first frame had left: its arrival here is taken for that."""
        now, saved_bytes = self._now(), int(self._is_present.sum()) * self._layout.bytes_per_block
        begun = self._arrivals[0][0] if self._arrivals else now
        hidden_s = min(max(0.0, handoff.overlap_s if handoff else 0.0), now - begun)
        hidden_bytes = max([total for at, total in self._arrivals if at < begun + hidden_s], default=0)
        return Pulled(
            handoff, self._size_bytes, len(self._digests), num_resumes, self._carrier.name, saved_bytes, hidden_bytes,
            now - begun, now - begun - hidden_s,
        )  # fmt: skip

    async def _pull_once(self, timeout_s: float) -> HandOff | None:
        loop = asyncio.get_running_loop()
        try:
            async with (
                asyncio.timeout(timeout_s) as patience,
                aclosing(self._carrier.pull(self._lease, len(self._digests), self._present)) as stream,
            ):
                async for message in stream:
                    patience.reschedule(loop.time() + timeout_s)
                    if isinstance(message, Commit):
                        return self._check_commit(message)
                    self._take(message)
        except TimeoutError:
            raise TransferFailed(f"nothing came for {timeout_s:g} s after {len(self._digests)} frames") from None
        raise TransferFailed(f"the stream ended without COMMIT after {len(self._digests)} frames")

    def _take(self, frame: Frame | PlacedFrame) -> None:
        """Of a frame that is to be copied from its place only what has arrived can be checked: it is written first."""
        about = frame.place if isinstance(frame, PlacedFrame) else frame
        if about.index != len(self._digests):
            raise FrameCorrupt(f"frame {about.index} came where {len(self._digests)} was due")
        spec = about.spec
        self._check_bounds(about.index, spec)
        size_bytes = self._copy(frame) if isinstance(frame, PlacedFrame) else self._write(frame)
        self._came_of(spec)[:] = True
        self._digests.append(about.digest)
        self._size_bytes += size_bytes
        self._arrivals.append((self._now(), self._size_bytes))

    def _write(self, frame: Frame) -> int:
        spec = frame.spec
        if len(frame.payload) != payload_bytes(self._layout, spec):
            raise FrameCorrupt(f"frame {frame.index} has {len(frame.payload)} bytes, which do not fit {spec}")
        if self._verify_digests:
            frame.verify()
        self._pool.write(spec.plane, spec.layers, self._ids(spec), memoryview(frame.payload))
        return len(frame.payload)

    def _copy(self, frame: PlacedFrame) -> int:
        place, source, spec = frame.place, frame.source, frame.place.spec
        ids = place.block_ids
        if len(ids) != len(spec.blocks) or (ids and not 0 <= min(ids) <= max(ids) < source.num_blocks):
            raise FrameCorrupt(f"frame {place.index} lies in blocks that its producer does not have")
        arrived = copy_frame(source, self._pool, spec.plane, spec.layers, place.block_ids, self._ids(spec))
        if self._verify_digests:
            if pieces_digest(place.index, spec, arrived) != place.digest:
                raise FrameCorrupt(f"frame {place.index} does not match its digest")
        else:
            deque(arrived, maxlen=0)
        return payload_bytes(self._layout, spec)

    def _ids(self, spec: FrameSpec) -> Sequence[int]:
        return self._block_ids[spec.blocks.start : spec.blocks.stop]

    def _check_bounds(self, index: int, spec: FrameSpec) -> None:
        if spec.plane >= len(self._layout.planes):
            raise FrameCorrupt(f"frame {index} is of unknown plane {spec.plane}")
        num_layers = self._layout.planes[spec.plane].num_slots
        inside = 0 <= spec.layers.start < spec.layers.stop <= num_layers
        if not (inside and 0 <= spec.blocks.start < spec.blocks.stop <= len(self._block_ids)):
            raise FrameCorrupt(f"frame {index} does not fit the reservation: {spec}")
        if self._came_of(spec).any():
            raise FrameCorrupt(f"frame {index} is of records that are here already: {spec}")

    def _came_of(self, spec: FrameSpec) -> np.ndarray:
        """Of these records, which are here: a view."""
        return self._came[spec.plane][spec.layers.start : spec.layers.stop, spec.blocks.start : spec.blocks.stop]

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _check_commit(self, commit: Commit) -> HandOff | None:
        if commit.num_frames != len(self._digests) or commit.digest != commit_digest(self._digests, commit.handoff):
            raise FrameCorrupt(
                f"COMMIT of {commit.num_frames} frames does not match the {len(self._digests)} that came"
            )
        if self._num_lent is not None:
            self._check_covered(self._num_lent)
            return None
        handoff = HandOff.decode(commit.handoff)
        self._check_covered(len(transfer_entries(self._layout.groups, handoff.computed, self._layout.block_size)))
        for request in (handoff.request, *handoff.siblings):
            if request.key not in self._keys:
                raise FrameCorrupt(f"COMMIT is for {request.key}, the offer for {', '.join(map(str, self._keys))}")
        return handoff

    def _check_covered(self, num_blocks: int) -> None:
        """Are as many of the first blocks here, and is nothing else?"""
        missing = num_blocks - int(self._is_present[:num_blocks].sum())
        whole = num_blocks <= len(self._block_ids) and all(came[:, :num_blocks].all() for came in self._came)
        if not whole or self._size_bytes != missing * self._layout.bytes_per_block:
            raise FrameCorrupt(
                f"the {self._size_bytes} bytes that came do not make {missing} blocks, missing of {num_blocks}"
            )
