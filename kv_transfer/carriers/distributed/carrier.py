"""The consumer's end of the dist carrier: frames come out of the porter's ring, the COMMIT by RPC."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing

import grpc
import xxhash

from engine.errors import FrameCorrupt, SteelyardError, TransferFailed
from engine.runs import Runs
from kv_transfer.carrier import as_transfer_error
from kv_transfer.carriers.distributed.link_end import LinkEnd
from kv_transfer.carriers.distributed.porters import Porters
from kv_transfer.carriers.distributed.process import PorterProcess
from kv_transfer.carriers.distributed.records import TOKEN_BYTES, Arrived
from kv_transfer.carriers.distributed.service import NAME_BYTES, SERVICE, pack_meeting, pack_wanted, unpack_keys
from kv_transfer.carriers.grpc import GrpcCarrier
from kv_transfer.carriers.sample import SAMPLE_BYTES
from kv_transfer.carriers.status import typed_errors
from kv_transfer.frames import HEADER_BYTES, Commit, Frame, Message, decode
from kv_transfer.lease import Lease

MEET_TIMEOUT_S = 10.0  # both porters may have to start first
SAMPLE_TIMEOUT_S = 5.0


class DistLink:
    """An open link to the porter of one life of one producer, until `close`."""

    def __init__(self, channel: grpc.aio.Channel, porter: PorterProcess, end: LinkEnd) -> None:
        self._channel = channel
        self.porter = porter
        self.end = end

    @classmethod
    async def open(cls, channel: grpc.aio.Channel, porters: Porters) -> DistLink:
        """Raises TransferFailed if the two porters do not find each other in time."""
        name, token = secrets.token_hex(NAME_BYTES // 2), secrets.token_bytes(TOKEN_BYTES)
        try:
            async with asyncio.timeout(MEET_TIMEOUT_S):
                porter = await porters.ready()
                end = porter.open_link(name, token, is_producer=False)
                try:
                    about = pack_meeting(name, token, porter.setup.frame_bytes, await end.said)
                    answer = await _call(channel, "Meet", about, MEET_TIMEOUT_S)
                    porter.tell(end, unpack_keys(answer))
                    await end.opened
                except BaseException:
                    porter.close_link(end)
                    raise
        except TimeoutError:
            raise TransferFailed(f"the porters did not meet within {MEET_TIMEOUT_S:g} s") from None
        return cls(channel, porter, end)

    @property
    def is_over(self) -> bool:
        return self.end.reason is not None

    async def rate(self, digest: int) -> float:
        """Bytes per second at which the sample comes and is checked. Raises TransferFailed."""
        loop, found, size_bytes = asyncio.get_running_loop(), xxhash.xxh3_64(), 0
        number, begun = self.begin(), loop.time()
        asking = loop.create_task(self._ask_for_sample(number))
        try:
            async with asyncio.timeout(SAMPLE_TIMEOUT_S):
                while size_bytes < SAMPLE_BYTES:
                    size_bytes += await self._hash_next(number, found)
        except TimeoutError:
            raise TransferFailed(f"the sample did not come within {SAMPLE_TIMEOUT_S:g} s") from None
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            self.finish(number)
        if found.intdigest() != digest:
            raise FrameCorrupt("the sample that came over the link does not match its digest")
        return size_bytes / (loop.time() - begun)

    async def _ask_for_sample(self, number: int) -> None:
        try:
            await _call(self._channel, "Sample", pack_wanted(self.end.name, number), SAMPLE_TIMEOUT_S)
        except TransferFailed as error:
            self.end.arrivals[number].put_nowait(error)

    async def _hash_next(self, number: int, found: xxhash.xxh3_64) -> int:
        one = await self.end.arrivals[number].get()
        if isinstance(one, TransferFailed):
            raise one
        assert isinstance(one, Arrived), "a sample has no COMMIT"
        parts = [part[HEADER_BYTES:] for part in self.frames(one)]
        for part in parts:
            found.update(part)
        self.porter.free(self.end, one)
        return sum(map(len, parts))

    def frames(self, one: Arrived) -> Iterator[memoryview]:
        """Headers and payloads, until they are freed."""
        for slot, size_bytes in zip(one.slots, one.sizes, strict=True):
            yield self.porter.arrived(self.end, slot, size_bytes)

    def begin(self) -> int:
        """The number of a new pull, for which what arrives is kept. Raises TransferFailed if the link is over."""
        if self.end.reason is not None:
            raise TransferFailed(f"the link between the porters is over: {self.end.reason}")
        self.end.num_pulls += 1
        self.end.arrivals[self.end.num_pulls] = asyncio.Queue()
        return self.end.num_pulls

    def finish(self, number: int) -> None:
        """What has arrived for it and what will is of no use any more."""
        left = self.end.arrivals.pop(number)
        while not left.empty():
            if isinstance(one := left.get_nowait(), Arrived):
                self.porter.free(self.end, one)

    def close(self) -> None:
        self.porter.close_link(self.end)


class DistCarrier(GrpcCarrier):
    """Implements kv_transfer.carrier.Carrier over an open link."""

    name = "dist"

    def __init__(self, channel: grpc.aio.Channel, link: DistLink) -> None:
        super().__init__(channel)
        self._link = link
        self._moved = channel.unary_stream(f"/{SERVICE}/Pull")

    async def pull(self, lease: Lease, first_frame: int, present: Runs = ()) -> AsyncGenerator[Message]:
        """A frame that is yielded lies in the ring, and only until the next one is asked for."""
        number, index, commit = self._link.begin(), first_frame, None
        items = self._link.end.arrivals[number]
        asking = asyncio.get_running_loop().create_task(self._ask(number, lease, first_frame, present))
        try:
            while commit is None or index < commit.num_frames:
                item = await items.get()
                if isinstance(item, TransferFailed):
                    raise item
                if isinstance(item, Commit):
                    commit = item  # frames go another way, and may come later
                    continue
                try:
                    for data in self._link.frames(item):
                        yield _frame(data)
                        index += 1
                finally:
                    self._link.porter.free(self._link.end, item)
            yield commit
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            self._link.finish(number)

    async def _ask(self, number: int, lease: Lease, first_frame: int, present: Runs) -> None:
        """Let the frames come; the COMMIT, or what is wrong, comes to them."""
        items, wanted = self._link.end.arrivals[number], pack_wanted(self._link.end.name, number)
        try:
            async with aclosing(self._received(self._moved, lease, first_frame, present, wanted)) as received:
                async for data in received:
                    message = decode(data)
                    if not isinstance(message, Commit):
                        raise FrameCorrupt("there came no COMMIT where one was due")
                    items.put_nowait(message)
                    return
            raise TransferFailed("the stream ended without COMMIT")
        except TransferFailed as error:
            items.put_nowait(error)


def _frame(data: memoryview) -> Frame:
    message = decode(data)
    if not isinstance(message, Frame):
        raise FrameCorrupt("something else than a frame came over the link")
    return message


async def _call(channel: grpc.aio.Channel, method: str, data: bytes, timeout_s: float) -> bytes:
    try:
        with typed_errors():
            return await channel.unary_unary(f"/{SERVICE}/{method}")(data, timeout=timeout_s)
    except SteelyardError as error:
        raise as_transfer_error(error) from None
