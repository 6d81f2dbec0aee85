"""Channels to workers: one per (address, incarnation), which adds the cluster's token to every call."""

from __future__ import annotations

from collections.abc import Callable

import grpc

from cluster.rpc.auth import call_token
from cluster.rpc.tls import CHANNEL_OPTIONS, Tls
from kv_transfer.carriers.status import INCARNATION_METADATA, SECRET_METADATA

MAX_MESSAGE_BYTES = 4 * 2**20
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 5000),
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 4000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.so_reuseport", 0),
)

_Metadata = tuple[tuple[str, str], ...]


class _AddUnary(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self, metadata: _Metadata) -> None:
        self._metadata = metadata

    async def intercept_unary_unary(self, continuation: Callable, client_call_details, request):
        return await continuation(_with(client_call_details, self._metadata), request)


class _AddStream(grpc.aio.UnaryStreamClientInterceptor):
    def __init__(self, metadata: _Metadata) -> None:
        self._metadata = metadata

    async def intercept_unary_stream(self, continuation: Callable, client_call_details, request):
        return await continuation(_with(client_call_details, self._metadata), request)


def _with(details: grpc.aio.ClientCallDetails, metadata: _Metadata) -> grpc.aio.ClientCallDetails:
    merged = grpc.aio.Metadata(*(details.metadata or ()), *metadata)
    rest = (details.credentials, details.wait_for_ready)
    return grpc.aio.ClientCallDetails(details.method, details.timeout, merged, *rest)


class Channels:
    """Opens channels on demand; whoever learns that a worker's life has ended lets its channel be closed."""

    def __init__(self, secret: bytes, tls: Tls | None = None) -> None:
        self._token = call_token(secret)
        self._credentials = tls.for_channel() if tls is not None else None
        self._open: dict[tuple[str, str], grpc.aio.Channel] = {}

    def __call__(self, address: str, incarnation: str) -> grpc.aio.Channel:
        channel = self._open.get((address, incarnation))
        if channel is None:
            metadata = ((SECRET_METADATA, self._token), (INCARNATION_METADATA, incarnation))
            channel = self._new(address, [_AddUnary(metadata), _AddStream(metadata)])
            self._open[(address, incarnation)] = channel
        return channel

    def _new(self, address: str, interceptors: list[grpc.aio.ClientInterceptor]) -> grpc.aio.Channel:
        if self._credentials is None:
            return grpc.aio.insecure_channel(address, options=OPTIONS, interceptors=interceptors)
        options = OPTIONS + CHANNEL_OPTIONS
        return grpc.aio.secure_channel(address, self._credentials, options=options, interceptors=interceptors)

    async def forget(self, address: str, incarnation: str) -> None:
        """Close the channel to a worker's life that has ended."""
        channel = self._open.pop((address, incarnation), None)
        if channel is not None:
            await channel.close()

    async def close(self) -> None:
        for target in list(self._open):
            await self.forget(*target)
