"""The outbox: blocks of prefilled requests, read by their lease's owner while later ones are still computed.

An entry's life:
1. `grant` makes the lease; nothing can be read yet;
2. the first pull says which blocks its owner has already: they are in no frame. Whoever comes back must say the same;
3. `progress` tells which blocks are complete by now, or which of their layers while a step fills them: frames are cut
   of what is missing there; readers wake;
4. `commit` tells the rest and adds the HandOff: readers get the COMMIT;
5. `release` by the owner, `close` by the producer, or `expire` after `ttl_s` without a heartbeat: the entry is gone and
   readers get LeaseLost. `on_end` is told once, unless it was the producer itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from engine.errors import FrameCorrupt, InvalidRequest, LeaseLost
from engine.planes import CacheLayout
from engine.pool import BlockBytes, records_in_place
from engine.ring import RingPool
from engine.runs import Runs, gaps
from engine.types import Endpoint, Key
from kv_transfer.frames import (
    Commit,
    Frame,
    FrameSpec,
    Place,
    commit_digest,
    cut_frames,
    frame_digest,
    pieces_digest,
)
from kv_transfer.lease import Lease
from prefill_worker.staging import Staging
from prefill_worker.stored import NOTHING, Stored, newly_stored

PLACES_AT_ONCE = 8  # in one message: each costs far more to send than to make


@dataclass(slots=True, eq=False)
class _Entry:
    lease: Lease
    expires_at: float
    present: Runs | None = None  # what its owner has already, once it has said so
    block_ids: tuple[int, ...] = ()  # that are complete, or being filled
    stored: Stored = NOTHING  # of these
    cut: Stored = NOTHING  # what is in frames or with the owner
    frames: list[FrameSpec] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)  # of the frames read so far
    first_left: float | None = None  # when the first of them was taken by what carries it
    handoff: bytes | None = None
    ended: bool = False
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def wake(self) -> None:
        self.news.set()
        self.news = asyncio.Event()


class Outbox:
    """Implements kv_transfer.carrier.Producer."""

    def __init__(
        self, layout: CacheLayout, pool: BlockBytes, frame_bytes: int, ttl_s: float,
        new_secret: Callable[[], str], on_end: Callable[[Key], None],
    ) -> None:  # fmt: skip
        self._layout = layout
        self._pool = pool
        self._staging = Staging(pool) if isinstance(pool, RingPool) else None
        self._frame_bytes = frame_bytes
        self.ttl_s = ttl_s
        self._new_secret = new_secret
        self._on_end = on_end
        self._entries: dict[Key, _Entry] = {}

    @property
    def num_leases(self) -> int:
        return len(self._entries)

    # --- the producer's side -------------------------------------------------------------------------------

    def grant(self, key: Key, producer: Endpoint) -> Lease:
        lease = Lease(
            key, producer.worker_id, producer.incarnation, producer.address, producer.cohort, self._new_secret()
        )
        self._entries[key] = _Entry(lease, self._now() + self.ttl_s)
        return lease

    def progress(self, key: Key, block_ids: tuple[int, ...], num_layers: int | None = None) -> None:
        """These blocks are complete and become readable; the ones told before come first. With `num_layers` the others
        are complete in so many layers only."""
        entry = self._entries.get(key)
        if entry is None:
            return
        if num_layers is None:
            self._take(entry, block_ids, Stored.whole(len(block_ids)))
        else:
            num_slots = self._layout.num_slots_stored(num_layers)
            self._take(entry, block_ids, Stored(entry.stored.num_whole, len(block_ids), num_slots))

    def commit(self, key: Key, block_ids: tuple[int, ...], handoff: bytes) -> None:
        """All is computed: with the rest of the blocks readers get the COMMIT."""
        entry = self._entries.get(key)
        if entry is not None:
            entry.handoff = handoff
            self._take(entry, block_ids, Stored.whole(len(block_ids)))

    def overlap_s(self, key: Key) -> float:
        """For how long frames have been leaving by now; 0 if none has."""
        entry = self._entries.get(key)
        return 0.0 if entry is None or entry.first_left is None else self._now() - entry.first_left

    def close(self, key: Key) -> None:
        """The producer takes the entry back (the request has ended). Closing an unknown key is no error."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            entry.ended = True
            entry.wake()
            if self._staging is not None:
                self._staging.give_back(key)

    def expire(self) -> list[Key]:
        """End the leases whose owner has been silent for too long; returns their keys."""
        late = [key for key, entry in self._entries.items() if entry.expires_at <= self._now()]
        for key in late:
            self.close(key)
            self._on_end(key)
        return late

    # --- the owner's side ----------------------------------------------------------------------------------

    async def messages(self, lease: Lease, first_frame: int, present: Runs = ()) -> AsyncGenerator[Frame | Commit]:
        entry = self._begin(lease, first_frame, present)
        async with aclosing(self._readable(entry, first_frame, at_once=1)) as readable:
            async for indexes in readable:
                yield self._frame(entry, indexes.start)
        yield self._commit_message(entry)

    async def places(
        self, lease: Lease, first_frame: int, present: Runs = ()
    ) -> AsyncGenerator[tuple[Place, ...] | Commit]:
        """Of a pool behind a ring so many as there are slots for, once: who comes back has copied them."""
        entry = self._begin(lease, first_frame, present)
        if self._staging is not None:
            self._staging.give_back(lease.key)
        async with aclosing(self._readable(entry, first_frame, PLACES_AT_ONCE)) as readable:
            async for indexes in readable:
                if self._staging is not None:
                    yield await self._stage(entry, indexes, self._staging)
                    return
                yield tuple([self._place(entry, index) for index in indexes])
        yield self._commit_message(entry)

    def _begin(self, lease: Lease, first_frame: int, present: Runs) -> _Entry:
        """The entry, with its frames cut for who has these blocks already."""
        entry = self._find(lease)
        if entry.present is None:
            entry.present = present
            self._cut(entry)
        elif entry.present != present:
            raise InvalidRequest("another pull under this lease said that other blocks are there", param="present")
        if first_frame > len(entry.digests):
            raise FrameCorrupt(f"frame {first_frame} is wanted, and only {len(entry.digests)} were ever sent")
        return entry

    async def _readable(self, entry: _Entry, first_frame: int, at_once: int) -> AsyncGenerator[range]:
        """The numbers of frames that can be read, as they become so, until all of them have: at first one, then twice
        as many each time up to `at_once`, so that the reader begins at once. Out of a ring one message is all that is
        told."""
        index, size = first_frame, at_once if self._staging is not None else 1
        while True:
            news = entry.news
            while index < len(entry.frames) and not entry.ended:
                stop = min(index + size, len(entry.frames))
                size = min(2 * size, at_once)
                yield range(index, stop)
                entry.first_left = self._now() if entry.first_left is None else entry.first_left
                index = stop
            if entry.ended:
                raise LeaseLost(f"the lease on {entry.lease.key} has ended")
            if entry.handoff is not None:
                return
            await news.wait()  # ends at the latest when the lease expires

    def release(self, lease: Lease) -> None:
        entry = self._entries.get(lease.key)
        if entry is not None and entry.lease.matches(lease):
            self.close(lease.key)
            self._on_end(lease.key)

    def renew(self, leases: Sequence[Lease]) -> None:
        for lease in leases:
            entry = self._entries.get(lease.key)
            if entry is not None and entry.lease.matches(lease):
                entry.expires_at = self._now() + self.ttl_s

    # --- parts ---------------------------------------------------------------------------------------------

    def _find(self, lease: Lease) -> _Entry:
        entry = self._entries.get(lease.key)
        if entry is None or not entry.lease.matches(lease):
            raise LeaseLost(f"no such lease on {lease.key}")
        return entry

    def _take(self, entry: _Entry, block_ids: tuple[int, ...], stored: Stored) -> None:
        entry.block_ids = block_ids
        entry.stored = stored
        self._cut(entry)
        entry.wake()

    def _cut(self, entry: _Entry) -> None:
        """Once it is known what is missing there. A frame that was cut keeps its number."""
        if entry.present is None:
            return
        for blocks, slots in newly_stored(entry.cut, entry.stored, self._layout.num_slots):
            for missing in gaps(entry.present, blocks):
                entry.frames += cut_frames(self._layout, missing, self._frame_bytes, slots)
        entry.cut = entry.stored

    def _frame(self, entry: _Entry, index: int) -> Frame:
        spec, block_ids = self._records(entry, index)
        payload = self._pool.read(spec.plane, spec.layers, block_ids)
        if index == len(entry.digests):
            entry.digests.append(frame_digest(index, spec, payload))
        return Frame(index, spec, payload, entry.digests[index])

    def _place(self, entry: _Entry, index: int) -> Place:
        spec, block_ids = self._records(entry, index)
        if index == len(entry.digests):
            pieces = records_in_place(self._pool, spec.plane, spec.layers, block_ids)
            entry.digests.append(pieces_digest(index, spec, pieces))
        return Place(index, spec, block_ids, entry.digests[index])

    async def _stage(self, entry: _Entry, indexes: range, staging: Staging) -> tuple[Place, ...]:
        """The first of these frames, or more, in slots of the ring; waits while it is full."""
        await staging.room(lambda: entry.ended)
        places: list[Place] = []
        for index in indexes:
            slot = None if entry.ended else staging.take(entry.lease.key)
            if slot is None:
                break
            places.append(self._staged_place(entry, index, slot, staging.pool))
        if not places:
            raise LeaseLost(f"the lease on {entry.lease.key} has ended")
        return tuple(places)

    def _staged_place(self, entry: _Entry, index: int, slot: int, pool: RingPool) -> Place:
        spec, block_ids = self._records(entry, index)
        payload = pool.stage(spec.plane, spec.layers, block_ids, slot)
        if index == len(entry.digests):
            entry.digests.append(frame_digest(index, spec, payload))
        start = slot * pool.ring.slot_bytes
        return Place(index, spec, (), entry.digests[index], range(start, start + len(payload)))

    def _records(self, entry: _Entry, index: int) -> tuple[FrameSpec, tuple[int, ...]]:
        """What a frame holds, and the blocks here that hold it."""
        spec = entry.frames[index]
        return spec, entry.block_ids[spec.blocks.start : spec.blocks.stop]

    def _commit_message(self, entry: _Entry) -> Commit:
        handoff = entry.handoff
        assert handoff is not None, "all frames are complete"
        for index in range(len(entry.digests), len(entry.frames)):
            self._place(entry, index)
        return Commit(len(entry.frames), commit_digest(entry.digests, handoff), handoff)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
