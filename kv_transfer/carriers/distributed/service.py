"""The producer's end of the dist carrier, as others call it: over the worker's own gRPC server, behind its checks.

`Meet` opens a link, `Sample` sends known bytes over it, and `Pull` sends a lease's frames and answers with the COMMIT.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import cast

import grpc
import msgpack

from engine.errors import InvalidRequest, SteelyardError, TransferFailed
from engine.planes import CacheLayout
from engine.runs import Runs
from kv_transfer.carrier import Producer
from kv_transfer.carriers.distributed.link_end import LinkEnd
from kv_transfer.carriers.distributed.porters import Porters
from kv_transfer.carriers.distributed.process import PorterProcess
from kv_transfer.carriers.distributed.records import (
    MAX_BURST,
    TOKEN_BYTES,
    Keys,
    Outgoing,
    Payload,
    Records,
    SamplePart,
    Send,
)
from kv_transfer.carriers.grpc import sent
from kv_transfer.carriers.status import abort_with
from kv_transfer.frames import Commit, Place, frame_header, payload_bytes
from kv_transfer.lease import Lease

SERVICE = "steelyard.KVDist"
NAME_BYTES = 16
MAX_KEYS, MAX_KEY_BYTES = 16, 4096
_WANTED = struct.Struct(f"<{NAME_BYTES}sI")  # name of the link, number of the pull; behind it, the lease


def pack_meeting(link: str, token: bytes, frame_bytes: int, keys: Keys) -> bytes:
    return cast(bytes, msgpack.packb([link, token, frame_bytes, keys]))


def unpack_meeting(data: bytes) -> tuple[str, bytes, int, Keys]:
    """Raises InvalidRequest for anything else than what pack_meeting makes."""
    try:
        link, token, frame_bytes, keys = msgpack.unpackb(data)
        if not (_is_name(link) and _is_token(token) and isinstance(frame_bytes, int)):
            raise ValueError("name, token or size of frames is none")
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise InvalidRequest(f"malformed meeting: {error}", param="link") from None
    return link, token, frame_bytes, _checked_keys(keys)


def pack_keys(keys: Keys) -> bytes:
    return cast(bytes, msgpack.packb(keys))


def unpack_keys(data: bytes) -> Keys:
    """Raises InvalidRequest."""
    try:
        return _checked_keys(msgpack.unpackb(data))
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise InvalidRequest(f"malformed keys: {error}", param="keys") from None


def pack_wanted(link: str, pull: int) -> bytes:
    """What stands before a lease, and alone where a sample is wanted."""
    return _WANTED.pack(link.encode(), pull)


def unpack_wanted(data: bytes) -> tuple[str, int, bytes]:
    """Link, number of the pull, and the rest. Raises InvalidRequest."""
    try:
        encoded, pull = _WANTED.unpack_from(data)
        name = encoded.decode("ascii")
    except (struct.error, UnicodeDecodeError) as error:
        raise InvalidRequest(f"malformed request: {error}", param="link") from None
    if not name.isalnum():
        raise InvalidRequest("no link has such a name", param="link")
    return name, pull, data[_WANTED.size :]


class DistService:
    """What a producer does for those who pull from it."""

    def __init__(self, producer: Producer, porters: Porters) -> None:
        self._producer = producer
        self._porters = porters

    async def meet(self, data: bytes) -> bytes:
        link, token, frame_bytes, keys = unpack_meeting(data)
        if frame_bytes != self._porters.setup.frame_bytes:
            raise TransferFailed(f"frames have up to {self._porters.setup.frame_bytes} bytes here, {frame_bytes} there")
        porter = await self._porters.ready()
        return pack_keys(await porter.open_link(link, token, True, keys).said)

    async def sample(self, data: bytes) -> None:
        name, pull, _ = unpack_wanted(data)
        porter, end = self._link(name)
        size, step = self._porters.sample_bytes, self._porters.setup.frame_bytes
        parts = [SamplePart(range(start, min(start + step, size))) for start in range(0, size, step)]
        await _send(porter, end, pull, parts)

    async def moved(
        self, name: str, pull: int, lease: Lease, first_frame: int, present: Runs
    ) -> AsyncGenerator[Commit]:
        """The frames go over the link; what is told is the COMMIT."""
        porter, end = self._link(name)
        if self._porters.is_mapped:
            source = self._producer.places(lease, first_frame, present)
        else:
            source = self._producer.messages(lease, first_frame, present)
        async with aclosing(source) as messages:
            async for message in messages:
                if isinstance(message, Commit):
                    yield message
                elif isinstance(message, tuple):
                    await _send(porter, end, pull, [_records(place, self._porters.setup.layout) for place in message])
                else:
                    header = frame_header(message.index, message.spec, message.digest, len(message.payload))
                    await _send(porter, end, pull, [Payload(header, bytes(message.payload))])

    def _link(self, name: str) -> tuple[PorterProcess, LinkEnd]:
        porter = self._porters.present()
        return porter, porter.link(name)


def dist_handler(service: DistService) -> grpc.GenericRpcHandler:
    async def meet(data: bytes, context: grpc.aio.ServicerContext) -> bytes:
        try:
            return await service.meet(data)
        except SteelyardError as error:
            await abort_with(context, error)
            raise

    async def sample(data: bytes, context: grpc.aio.ServicerContext) -> bytes:
        try:
            await service.sample(data)
        except SteelyardError as error:
            await abort_with(context, error)
        return b""

    async def pull(data: bytes, context: grpc.aio.ServicerContext) -> AsyncGenerator[bytes]:
        try:
            name, number, rest = unpack_wanted(data)
        except InvalidRequest as error:
            await abort_with(context, error)
            return
        async with aclosing(sent(partial(service.moved, name, number), rest, context)) as messages:
            async for message in messages:
                yield message

    handlers = {
        "Meet": grpc.unary_unary_rpc_method_handler(meet),
        "Sample": grpc.unary_unary_rpc_method_handler(sample),
        "Pull": grpc.unary_stream_rpc_method_handler(pull),
    }
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


async def _send(porter: PorterProcess, end: LinkEnd, pull: int, frames: Sequence[Outgoing]) -> None:
    for start in range(0, len(frames), MAX_BURST):
        await porter.send(end, Send(end.name, pull, tuple(frames[start : start + MAX_BURST])))


def _records(place: Place, layout: CacheLayout) -> Records:
    spec = place.spec
    header = frame_header(place.index, spec, place.digest, payload_bytes(layout, spec))
    return Records(header, spec.plane, spec.layers, place.block_ids)


def _is_name(link: object) -> bool:
    return isinstance(link, str) and link.isascii() and link.isalnum() and len(link) == NAME_BYTES


def _is_token(token: object) -> bool:
    return isinstance(token, bytes) and len(token) == TOKEN_BYTES


def _checked_keys(keys: object) -> Keys:
    if not isinstance(keys, list) or len(keys) > MAX_KEYS:
        raise InvalidRequest(f"keys are no list of up to {MAX_KEYS}", param="keys")
    checked = []
    for pair in keys:
        is_pair = isinstance(pair, list) and len(pair) == 2
        if not (is_pair and isinstance(pair[0], str) and isinstance(pair[1], bytes) and len(pair[1]) <= MAX_KEY_BYTES):
            raise InvalidRequest("a key is no name with its bytes", param="keys")
        checked.append((pair[0], pair[1]))
    return tuple(checked)
