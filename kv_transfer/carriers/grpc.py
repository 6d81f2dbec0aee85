"""The gRPC carrier: one stream of raw frame messages per pull. Works between any two hosts.

Messages are the bytes of kv_transfer.frames as they are; requests are small msgpack records. Nothing is pickled. Beside
frames the same service tells places, for readers of the pool itself, and sends the sample that paths are measured with.
"""

from __future__ import annotations

import struct
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from itertools import pairwise
from typing import cast

import grpc
import msgpack
import xxhash

from engine.errors import FrameCorrupt, InvalidRequest, SteelyardError, TransferFailed
from engine.runs import Runs
from engine.types import Key, KvPath
from kv_transfer.carrier import Producer, as_transfer_error
from kv_transfer.carriers.sample import Sample
from kv_transfer.carriers.status import abort_with, typed_errors
from kv_transfer.frames import Commit, Frame, Message, Place, decode, decode_places, encode
from kv_transfer.lease import Lease

SERVICE = "steelyard.KV"
CALL_TIMEOUT_S = 2.0
PROBE_TIMEOUT_S = 5.0
PROBE_BYTES = 2**20  # in one message
MAX_RUNS = 2**18  # of blocks that a puller has already: more than any context has, and within gRPC's 4 MiB
_DIGEST = struct.Struct("<Q")

Channels = Callable[[str, str], grpc.aio.Channel]  # (address, incarnation) -> a channel that authenticates


def kv_handler(producer: Producer, sample: Sample | None = None) -> grpc.GenericRpcHandler:
    """Serves a producer's outbox, and a sample."""

    async def pull(data: bytes, context: grpc.aio.ServicerContext) -> AsyncGenerator[bytes]:
        async with aclosing(sent(producer.messages, data, context)) as messages:
            async for message in messages:
                yield message

    async def places(data: bytes, context: grpc.aio.ServicerContext) -> AsyncGenerator[bytes]:
        async with aclosing(sent(producer.places, data, context)) as messages:
            async for message in messages:
                yield message

    async def probe(_: bytes, context: grpc.aio.ServicerContext) -> AsyncGenerator[bytes]:
        """The sample's digest, then its bytes."""
        if sample is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this worker has no sample")
            return
        yield _DIGEST.pack(sample.digest)
        for start in range(0, len(sample.memory), PROBE_BYTES):
            yield sample.memory[start : start + PROBE_BYTES]

    async def release(data: bytes, context: grpc.aio.ServicerContext) -> bytes:
        try:
            for lease in _unpack(data)[0]:
                producer.release(lease)
        except SteelyardError as error:
            await abort_with(context, error)
        return b""

    async def renew(data: bytes, context: grpc.aio.ServicerContext) -> bytes:
        try:
            producer.renew(_unpack(data)[0])
        except SteelyardError as error:
            await abort_with(context, error)
        return b""

    handlers = {
        "Pull": grpc.unary_stream_rpc_method_handler(pull),
        "Places": grpc.unary_stream_rpc_method_handler(places),
        "Probe": grpc.unary_stream_rpc_method_handler(probe),
        "Release": grpc.unary_unary_rpc_method_handler(release),
        "Renew": grpc.unary_unary_rpc_method_handler(renew),
    }
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


async def sent(
    source: Callable[[Lease, int, Runs], AsyncGenerator[Frame | tuple[Place, ...] | Commit]],
    data: bytes,
    context: grpc.aio.ServicerContext,
) -> AsyncGenerator[bytes]:
    """What answers a pull: the encoded messages of `source`, or its error."""
    try:
        leases, first_frame, present = _unpack(data)
        async with aclosing(source(leases[0], first_frame, present)) as messages:
            async for message in messages:
                yield b"".join(map(encode, message)) if isinstance(message, tuple) else encode(message)
    except SteelyardError as error:
        await abort_with(context, error)


class GrpcCarrier:
    """The consumer's end. Implements kv_transfer.carrier.Carrier."""

    name = "grpc"

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._pull = channel.unary_stream(f"/{SERVICE}/Pull")
        self._places = channel.unary_stream(f"/{SERVICE}/Places")
        self._release = channel.unary_unary(f"/{SERVICE}/Release")
        self._renew = channel.unary_unary(f"/{SERVICE}/Renew")

    async def pull(self, lease: Lease, first_frame: int, present: Runs = ()) -> AsyncGenerator[Message]:
        async with aclosing(self._received(self._pull, lease, first_frame, present)) as received:
            async for data in received:
                message = decode(data)
                if isinstance(message, Place):
                    raise FrameCorrupt(f"frame {message.index} came without its bytes")
                yield message

    async def places(self, lease: Lease, first_frame: int, present: Runs = ()) -> AsyncGenerator[Place | Commit]:
        """Where the frames lie, for who reads the producer's pool itself."""
        async with aclosing(self._received(self._places, lease, first_frame, present)) as received:
            async for data in received:
                for message in decode_places(data):
                    yield message

    async def _received(
        self, method: grpc.aio.UnaryStreamMultiCallable, lease: Lease, first_frame: int, present: Runs,
        before: bytes = b"",
    ) -> AsyncGenerator[bytes]:  # fmt: skip
        try:
            with typed_errors():
                call = method(before + _pack((lease,), first_frame, present))
                try:
                    async for data in call:
                        yield data
                finally:
                    call.cancel()
        except SteelyardError as error:
            raise as_transfer_error(error) from None

    async def release(self, lease: Lease) -> None:
        await self._small_call(self._release, (lease,))

    async def renew(self, leases: Sequence[Lease]) -> None:
        await self._small_call(self._renew, leases)

    async def _small_call(self, method: grpc.aio.UnaryUnaryMultiCallable, leases: Sequence[Lease]) -> None:
        try:
            with typed_errors():
                await method(_pack(leases), timeout=CALL_TIMEOUT_S)
        except SteelyardError as error:
            raise as_transfer_error(error) from None


async def probe(channel: grpc.aio.Channel) -> tuple[int, float]:
    """Fetch the sample: its digest, which fits its bytes, and bytes per second. Raises TransferFailed, or LeaseLost if
    that life of the worker is over."""
    try:
        with typed_errors():
            call = channel.unary_stream(f"/{SERVICE}/Probe")(b"", timeout=PROBE_TIMEOUT_S)
            arriving = aiter(call)
            (wanted,) = _DIGEST.unpack(await anext(arriving))
            digest, size_bytes, begun = xxhash.xxh3_64(), 0, time.perf_counter()
            async for data in arriving:
                digest.update(data)
                size_bytes += len(data)
    except SteelyardError as error:
        raise as_transfer_error(error) from None
    except (struct.error, StopAsyncIteration):
        raise TransferFailed("the sample came without its digest") from None
    if digest.intdigest() != wanted:
        raise FrameCorrupt(f"the {size_bytes} bytes of the sample that came do not match its digest")
    return wanted, size_bytes / (time.perf_counter() - begun)


class GrpcCarriers:
    """Implements kv_transfer.carrier.CarrierPool over shared channels, for one kind of carrier only."""

    def __init__(self, channels: Channels) -> None:
        self._channels = channels
        self.num_fallbacks: dict[str, int] = {}

    def carrier(self, lease: Lease) -> GrpcCarrier:
        return GrpcCarrier(self._channels(lease.address, lease.incarnation))

    def paths(self) -> tuple[KvPath, ...]:
        return ()


def _pack(leases: Sequence[Lease], first_frame: int = 0, present: Runs = ()) -> bytes:
    """[leases, first frame, [start, stop, start, stop, ...] of the runs]."""
    rows = [
        [*lease.key, lease.worker_id, lease.incarnation, lease.address, lease.cohort, lease.secret] for lease in leases
    ]
    bounds = [bound for run in present for bound in (run.start, run.stop)]
    return cast(bytes, msgpack.packb([rows, first_frame, bounds]))


def _unpack(data: bytes) -> tuple[list[Lease], int, Runs]:
    """Raises InvalidRequest for anything else than what _pack makes."""
    try:
        rows, first_frame, bounds = msgpack.unpackb(data)
        leases = [_unpack_lease(*row) for row in rows]
        if not leases or not isinstance(first_frame, int) or first_frame < 0:
            raise ValueError("no lease, or no frame of that number")
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise InvalidRequest(f"malformed lease record: {error}", param="lease") from None
    return leases, first_frame, _runs(bounds)


def _unpack_lease(request_id: object, epoch: object, *names: object) -> Lease:
    if not isinstance(epoch, int) or not all(isinstance(one, str) for one in (request_id, *names)):
        raise TypeError("a lease has an epoch that is a number and names that are text")
    return Lease(Key(cast(str, request_id), epoch), *cast(tuple[str, ...], names))


def _runs(bounds: object) -> Runs:
    """Raises InvalidRequest for anything but ascending starts and stops."""
    if not isinstance(bounds, list) or len(bounds) > 2 * MAX_RUNS or len(bounds) % 2:
        raise InvalidRequest(f"present is no list of up to {MAX_RUNS} starts and stops", param="present")
    if not all(type(bound) is int for bound in bounds):
        raise InvalidRequest("present has a bound that is no whole number", param="present")
    if bounds and (bounds[0] < 0 or any(after <= before for before, after in pairwise(bounds))):
        raise InvalidRequest("present has runs that do not ascend", param="present")
    return tuple([range(start, stop) for start, stop in zip(bounds[::2], bounds[1::2], strict=True)])
