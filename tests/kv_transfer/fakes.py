"""A producer with one request in a real outbox, a target pool, and a link between them that can be made to fail."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field

from engine.errors import TransferFailed
from engine.planes import CacheLayout, attention_layout
from engine.pool import SharedPool
from engine.runs import Runs
from engine.types import Endpoint, Key, KvPath, Request, SamplingParams
from kv_transfer.frames import HEADER_BYTES, Message, Place, decode, encode
from kv_transfer.handoff import HandOff
from kv_transfer.lease import Lease
from kv_transfer.pull import Pulled, Puller
from prefill_worker.outbox import Outbox

LAYOUT = attention_layout(num_layers=3, num_kv_heads=2, head_dim=4, block_size=4, dtype="float32")  # 128-byte records
NUM_BLOCKS = 16
FRAME_BYTES = 256  # two records
KEY = Key("r", 0)
PRODUCER = Endpoint("p0", "i1", "127.0.0.1:1", "cohort")
TTL_S = 10.0
POISON = 0xAB  # what the target holds before a transfer, and after it wherever nothing was to be written


def request_of(num_tokens: int, key: Key = KEY) -> Request:
    """As a hand-off carries it: `num_tokens` of prompt and the first token."""
    return Request(key.request_id, tuple(range(num_tokens)), SamplingParams(max_tokens=8), key.epoch, (7,))


def handoff_of(num_tokens: int, key: Key = KEY) -> HandOff:
    return HandOff(request_of(num_tokens, key), num_tokens, 0, "g0")


def blocks_for(num_tokens: int, layout: CacheLayout = LAYOUT) -> int:
    return -(-num_tokens // layout.block_size)


def random_pool(layout: CacheLayout = LAYOUT, seed: int = 0) -> SharedPool:
    pool = SharedPool(layout, NUM_BLOCKS)
    pool.memory[:] = random.Random(seed).randbytes(pool.size_bytes)
    return pool


def poisoned_pool(layout: CacheLayout = LAYOUT) -> SharedPool:
    pool = SharedPool(layout, NUM_BLOCKS)
    pool.memory[:] = bytes([POISON]) * pool.size_bytes
    return pool


def block_bytes(pool: SharedPool, block_id: int) -> bytes:
    """All that one block holds, over planes and layers."""
    planes = enumerate(pool.layout.planes)
    return b"".join(pool.read(index, range(plane.num_slots), [block_id]) for index, plane in planes)


Fault = Callable[[int, bytes], Sequence[bytes]]  # (number of the message on this link, its bytes) -> what arrives


def deliver(_: int, data: bytes) -> Sequence[bytes]:
    return [data]


def once(number: int, change: Callable[[bytes], Sequence[bytes]]) -> Fault:
    """Change the message of this number, which is counted over all pulls and so comes once."""
    return lambda at, data: change(data) if at == number else [data]


def cut(_: bytes) -> Sequence[bytes]:
    raise TransferFailed("the link was cut")


def flip(offset: int, bit: int = 0) -> Callable[[bytes], Sequence[bytes]]:
    def change(data: bytes) -> Sequence[bytes]:
        at = offset % len(data)  # -1 is the last byte
        return [data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]]

    return change


def is_commit(data: bytes) -> bool:
    return data[4:5] == b"\x02"


@dataclass(eq=False)
class Link:
    """Implements Carrier over an outbox of this process. Every message is encoded, passes `fault`, and is decoded."""

    outbox: Outbox
    fault: Fault = deliver
    name: str = "link"
    num_fallbacks: dict[str, int] = field(default_factory=dict)
    pulls: list[int] = field(default_factory=list)  # the first frame that each pull asked for
    num_messages: int = 0
    num_payload_bytes: int = 0
    released: list[Lease] = field(default_factory=list)
    renewed: list[tuple[Lease, ...]] = field(default_factory=list)

    async def pull(self, lease: Lease, first_frame: int, present: Runs = ()) -> AsyncGenerator[Message]:
        self.pulls.append(first_frame)
        async with aclosing(self.outbox.messages(lease, first_frame, present)) as messages:
            async for message in messages:
                await asyncio.sleep(0)
                number, self.num_messages = self.num_messages, self.num_messages + 1
                for data in self.fault(number, encode(message)):
                    self.num_payload_bytes += 0 if is_commit(data) else max(0, len(data) - HEADER_BYTES)
                    decoded = decode(data)
                    assert not isinstance(decoded, Place), "no fault makes a place of a frame"
                    yield decoded

    async def release(self, lease: Lease) -> None:
        self.released.append(lease)
        self.outbox.release(lease)

    async def renew(self, leases: Sequence[Lease]) -> None:
        self.renewed.append(tuple(leases))
        self.outbox.renew(leases)

    def carrier(self, lease: Lease) -> Link:
        """Implements CarrierPool too."""
        return self

    def paths(self) -> tuple[KvPath, ...]:
        return ()


@dataclass(eq=False)
class Transfer:
    """From blocks of a source pool to blocks of a target pool."""

    source: SharedPool
    target: SharedPool
    outbox: Outbox
    lease: Lease
    link: Link
    num_tokens: int
    source_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    ended: list[Key]

    def compute(self, num_tokens: int, num_layers: int | None = None) -> None:
        """The next chunk of the prompt is stored, up to here; with `num_layers` so many of its layers are."""
        self.outbox.progress(self.lease.key, self.source_ids[: num_tokens // LAYOUT.block_size], num_layers)

    def commit(self, handoff: HandOff | None = None) -> None:
        data = (handoff or handoff_of(self.num_tokens)).encode()
        self.outbox.commit(self.lease.key, self.source_ids, data)

    def puller(self, verify_digests: bool = True, present: Runs = ()) -> Puller:
        target, lease = self.target, self.lease
        return Puller(target.layout, target, self.target_ids, self.link, lease, verify_digests, present=present)

    async def run(self, timeout_s: float = 1.0, verify_digests: bool = True, present: Runs = ()) -> Pulled:
        return await self.puller(verify_digests, present).run(timeout_s)

    def arrived(self) -> list[bool]:
        """Of each block of the request: does the target hold the source's bytes?"""
        pairs = zip(self.source_ids, self.target_ids, strict=True)
        return [block_bytes(self.source, a) == block_bytes(self.target, b) for a, b in pairs]

    def others_untouched(self) -> bool:
        """Has nothing been written outside of the reservation?"""
        poison = bytes([POISON]) * self.target.layout.bytes_per_block
        others = [block for block in range(NUM_BLOCKS) if block not in self.target_ids]
        return all(block_bytes(self.target, block) == poison for block in others)


@contextmanager
def transfer(
    num_tokens: int = 18, frame_bytes: int = FRAME_BYTES, layout: CacheLayout = LAYOUT, seed: int = 0,
    fault: Fault = deliver, producer: Endpoint = PRODUCER,
) -> Iterator[Transfer]:  # fmt: skip
    """A granted lease on blocks of which nothing is computed yet; block ids are shuffled on both sides."""
    order = random.Random(seed)
    count = blocks_for(num_tokens, layout)
    source_ids, target_ids = (tuple(order.sample(range(NUM_BLOCKS), count)) for _ in range(2))
    source, target = random_pool(layout, seed), poisoned_pool(layout)
    ended: list[Key] = []
    outbox = Outbox(layout, source, frame_bytes, TTL_S, lambda: "secret", ended.append)
    lease = outbox.grant(KEY, producer)
    try:
        yield Transfer(source, target, outbox, lease, Link(outbox, fault), num_tokens, source_ids, target_ids, ended)
    finally:
        source.close()
        target.close()
