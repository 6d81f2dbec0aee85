"""The gRPC carrier: one stream of raw frame messages per pull. Works between any two hosts.

Messages are the bytes of kv_transfer.frames as they are; requests are small msgpack records. Nothing is pickled.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import cast

import grpc
import msgpack

from engine.errors import InvalidRequest, SteelyardError
from engine.types import Key
from kv_transfer.carrier import Producer, as_transfer_error
from kv_transfer.carriers.status import abort_with, typed_errors
from kv_transfer.frames import Message, decode, encode
from kv_transfer.lease import Lease

SERVICE = "steelyard.KV"
CALL_TIMEOUT_S = 2.0

Channels = Callable[[str, str], grpc.aio.Channel]  # (address, incarnation) -> a channel that authenticates


def kv_handler(producer: Producer) -> grpc.GenericRpcHandler:
    """Serves a producer's outbox."""

    async def pull(data: bytes, context: grpc.aio.ServicerContext) -> AsyncGenerator[bytes]:
        try:
            leases, first_frame = _unpack(data)
            async with aclosing(producer.messages(leases[0], first_frame)) as messages:
                async for message in messages:
                    yield encode(message)
        except SteelyardError as error:
            await abort_with(context, error)

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
        "Release": grpc.unary_unary_rpc_method_handler(release),
        "Renew": grpc.unary_unary_rpc_method_handler(renew),
    }
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


class GrpcCarrier:
    """The consumer's end. Implements kv_transfer.carrier.Carrier."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._pull = channel.unary_stream(f"/{SERVICE}/Pull")
        self._release = channel.unary_unary(f"/{SERVICE}/Release")
        self._renew = channel.unary_unary(f"/{SERVICE}/Renew")

    async def pull(self, lease: Lease, first_frame: int) -> AsyncGenerator[Message]:
        try:
            with typed_errors():
                call = self._pull(_pack((lease,), first_frame))
                try:
                    async for data in call:
                        yield decode(data)
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
                await method(_pack(leases, 0), timeout=CALL_TIMEOUT_S)
        except SteelyardError as error:
            raise as_transfer_error(error) from None


class GrpcCarriers:
    """Implements kv_transfer.carrier.CarrierPool over shared channels."""

    def __init__(self, channels: Channels) -> None:
        self._channels = channels

    def carrier(self, lease: Lease) -> GrpcCarrier:
        return GrpcCarrier(self._channels(lease.address, lease.incarnation))


def _pack(leases: Sequence[Lease], first_frame: int) -> bytes:
    rows = [
        [*lease.key, lease.worker_id, lease.incarnation, lease.address, lease.cohort, lease.secret] for lease in leases
    ]
    return cast(bytes, msgpack.packb([rows, first_frame]))


def _unpack(data: bytes) -> tuple[list[Lease], int]:
    """Raises InvalidRequest for anything else than what _pack makes."""
    try:
        rows, first_frame = msgpack.unpackb(data)
        leases = [Lease(Key(str(row[0]), int(row[1])), *map(str, row[2:7])) for row in rows]
        if not leases or int(first_frame) < 0:
            raise ValueError("no lease, or a negative frame")
        return leases, int(first_frame)
    except (ValueError, TypeError, LookupError, OverflowError, msgpack.UnpackException) as error:
        raise InvalidRequest(f"malformed lease record: {error}", param="lease") from None
