"""Pools that nobody else can map: read through a ring and written through one, by each carrier; rings that are full."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest
import torch

from engine import build
from engine.errors import LeaseLost, TransferFailed
from engine.kv_cache import KVCache
from engine.pool import BlockBytes, SharedPool
from engine.ring import RingPool, StagingRing
from engine.runs import Runs
from engine.types import Key
from kv_transfer.carriers.door import PoolDoor
from kv_transfer.config import TransferConfig
from kv_transfer.frames import Commit, Place
from kv_transfer.lease import Lease
from kv_transfer.pull import Pulled, Puller
from prefill_worker.outbox import Outbox
from tests.kv_transfer.fakes import (
    FRAME_BYTES,
    LAYOUT,
    NUM_BLOCKS,
    POISON,
    PRODUCER,
    Transfer,
    handoff_of,
    poisoned_pool,
    random_pool,
    transfer,
)
from tests.kv_transfer.test_shm_carrier import TOKEN, Served, serve

NUM_SLOTS = 3  # two to be lent: far fewer than a transfer has frames
OTHER = Key("other", 0)
ALL = tuple(range(NUM_BLOCKS))


def behind_ring(content: SharedPool, device: str = "cpu") -> RingPool:
    """The same bytes in private memory, or on a device, behind a small ring. Takes the content's place."""
    cache, ring = KVCache(LAYOUT, NUM_BLOCKS, device, None), StagingRing(FRAME_BYTES, NUM_SLOTS)
    pool = build.behind_ring(cache, ring, device)
    for plane, layer, first in every_two(content):
        pool.write(plane, layer, ALL[first : first + 2], memoryview(content.read(plane, layer, ALL[first : first + 2])))
    content.close()
    return pool


def every_two(pool: SharedPool) -> list[tuple[int, range, int]]:
    """Plane, layer and first block of each two records: what fits a slot."""
    return [
        (plane, range(layer, layer + 1), first)
        for plane in range(len(pool.layout.planes))
        for layer in range(pool.layout.planes[plane].num_slots)
        for first in range(0, NUM_BLOCKS, 2)
    ]


@dataclass(eq=False)
class Case:
    """One request that is all computed, behind a ring; another pool's bytes, equal to it, to compare with."""

    served: Served
    base: Transfer
    pool: RingPool
    outbox: Outbox

    async def pull(self, target: BlockBytes) -> Pulled:
        carrier = self.served.carriers.carrier(self.served.lease)
        return await Puller(LAYOUT, target, self.base.target_ids, carrier, self.served.lease).run(5.0)

    def arrived(self, target: BlockBytes) -> bool:
        """Are the request's blocks there, and is nothing else written?"""
        wanted = poisoned_pool()
        for plane, about in enumerate(LAYOUT.planes):
            for layer in range(about.num_slots):
                one = range(layer, layer + 1)
                payload = self.base.source.read(plane, one, self.base.source_ids)
                wanted.write(plane, one, self.base.target_ids, memoryview(payload))
        same = all(
            target.read(plane, one, ALL[first : first + 2]) == wanted.read(plane, one, ALL[first : first + 2])
            for plane, one, first in every_two(wanted)
        )
        wanted.close()
        return same

    async def lend_all(self, other: Lease) -> AsyncGenerator[tuple[Place, ...] | Commit]:
        """A reader of another lease who has all slots and does not come back."""
        places = self.outbox.places(other, 0)
        told = await anext(places)
        assert isinstance(told, tuple) and len(told) == NUM_SLOTS - 1
        return places


@asynccontextmanager
async def case_of(carrier: str = "shm", kind: type[Outbox] = Outbox) -> AsyncIterator[Case]:
    producer = replace(PRODUCER, incarnation=secrets.token_hex(8))
    with transfer(producer=producer) as base:
        pool = behind_ring(random_pool())
        outbox = kind(LAYOUT, pool, FRAME_BYTES, 10.0, lambda: "secret", lambda _: None)
        base.lease = outbox.grant(base.lease.key, producer)
        outbox.commit(base.lease.key, base.source_ids, handoff_of(base.num_tokens).encode())
        config = TransferConfig.model_validate({"carrier": carrier})
        async with serve(base, config, outbox, has_door=False) as served:
            door = PoolDoor(pool, served.sample.fd, TOKEN, producer.incarnation)
            try:
                yield Case(served, base, pool, outbox)
            finally:
                await door.close()
        outbox.close(base.lease.key)
        pool.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_pool_on_a_device_gives_and_takes_the_same_bytes_through_a_pinned_ring() -> None:
    content, target = random_pool(), behind_ring(poisoned_pool(), "cuda")
    wanted = {(plane, layer, first): content.read(plane, layer, [first]) for plane, layer, first in every_two(content)}
    source = behind_ring(content, "cuda")
    for (plane, layer, first), payload in wanted.items():
        assert source.stage(plane, layer, [first], 1) == payload
        target.write(plane, layer, [first + 1], memoryview(payload))
        assert target.read(plane, layer, [first + 1]) == payload
    source.close()
    target.close()


@pytest.mark.parametrize("carrier", ["shm", "grpc"])
@pytest.mark.parametrize("has_ring", [True, False])
async def test_blocks_move_between_rings_and_mapped_pools_by_each_carrier(carrier: str, has_ring: bool) -> None:
    async with case_of(carrier) as case:
        target = behind_ring(poisoned_pool()) if has_ring else poisoned_pool()
        pulled = await case.pull(target)
        assert (pulled.carrier, pulled.num_resumes) == (carrier, 0)
        assert pulled.num_frames > NUM_SLOTS
        assert case.arrived(target)
        target.close()


# --- a full ring -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["released", "expired", "came back for the last time"])
async def test_a_pull_waits_while_the_ring_is_full_and_then_goes_on(how: str) -> None:
    async with case_of() as case:
        other = case.outbox.grant(OTHER, PRODUCER)
        case.outbox.commit(OTHER, case.base.source_ids[:3], handoff_of(12, OTHER).encode())
        reader = await case.lend_all(other)
        target = poisoned_pool()
        pull = asyncio.ensure_future(case.pull(target))
        done, _ = await asyncio.wait([pull], timeout=0.2)
        assert not done
        if how == "released":
            case.outbox.release(other)
        elif how == "expired":  # its reader has died
            case.outbox._entries[OTHER].expires_at = 0.0
            assert case.outbox.expire() == [OTHER]
        else:
            await reader.aclose()
            while isinstance(
                message := await anext(case.outbox.places(other, len(case.outbox._entries[OTHER].digests))), tuple
            ):
                assert message
        await pull
        assert case.arrived(target)
        assert case.outbox._staging is not None
        case.outbox.close(case.base.lease.key)
        assert case.outbox._staging.num_lent == 0
        target.close()


async def test_a_lease_that_ends_while_its_pull_waits_for_a_slot_is_lost() -> None:
    async with case_of() as case:
        other = case.outbox.grant(OTHER, PRODUCER)
        case.outbox.commit(OTHER, case.base.source_ids[:3], handoff_of(12, OTHER).encode())
        await case.lend_all(other)
        target = poisoned_pool()
        pull = asyncio.ensure_future(case.pull(target))
        await asyncio.wait([pull], timeout=0.2)
        case.outbox.close(case.base.lease.key)
        with pytest.raises(LeaseLost):
            await pull
        target.close()


# --- wrong bytes -----------------------------------------------------------------------------------------------


class _Flips(Outbox):
    """One bit of each frame's slot changes before its reader looks."""

    async def places(
        self, lease: Lease, first_frame: int, present: Runs = ()
    ) -> AsyncGenerator[tuple[Place, ...] | Commit]:
        async for message in super().places(lease, first_frame, present):
            for place in message if isinstance(message, tuple) else ():
                assert place.staged is not None and isinstance(self._pool, RingPool)
                self._pool.ring.memory[place.staged.stop - 1] ^= 1
            yield message


class _Elsewhere(Outbox):
    """Tells of bytes that no ring has."""

    async def places(
        self, lease: Lease, first_frame: int, present: Runs = ()
    ) -> AsyncGenerator[tuple[Place, ...] | Commit]:
        async for message in super().places(lease, first_frame, present):
            if isinstance(message, Commit):
                yield message
            else:
                yield tuple(replace(place, staged=range(2**40, 2**40 + FRAME_BYTES)) for place in message)


class _InBlocks(Outbox):
    """Tells of blocks, as if its pool were mapped."""

    async def places(
        self, lease: Lease, first_frame: int, present: Runs = ()
    ) -> AsyncGenerator[tuple[Place, ...] | Commit]:
        async for message in super().places(lease, first_frame, present):
            if isinstance(message, Commit):
                yield message
            else:
                yield tuple(replace(one, staged=None, block_ids=(0,) * len(one.spec.blocks)) for one in message)


@pytest.mark.parametrize(
    ("kind", "problem"),
    [(_Flips, "does not match its digest"), (_Elsewhere, "lies in no slot"), (_InBlocks, "lies in no slot")],
)
async def test_a_wrong_slot_is_seen_before_anything_is_written(kind: type[Outbox], problem: str) -> None:
    async with case_of("shm", kind) as case:
        target = poisoned_pool()
        with pytest.raises(TransferFailed, match=problem):
            await case.pull(target)
        assert target.memory[:] == bytes([POISON]) * target.size_bytes
        target.close()


async def test_after_wrong_slots_the_other_carrier_goes_on() -> None:
    async with case_of("auto", _Flips) as case:
        target = behind_ring(poisoned_pool())
        pulled = await case.pull(target)
        assert pulled.carrier == "grpc"
        assert case.arrived(target)
        target.close()
