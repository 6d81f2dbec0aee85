"""Who may call a worker, and whether the call was meant for this life of it."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable

import grpc

from engine.errors import StaleIncarnation
from kv_transfer.carriers.status import CODE_METADATA, INCARNATION_METADATA, SECRET_METADATA

Handler = grpc.RpcMethodHandler


def call_token(secret: bytes) -> str:
    """What calls carry: derived from the cluster's secret, which itself never travels."""
    return hashlib.blake2b(b"rpc", key=secret[:64], digest_size=32).hexdigest()


def prefix_hash_key(secret: bytes) -> bytes:
    """The key of prefix hashes, equal on all workers of the cluster."""
    return hashlib.blake2b(b"prefix", key=secret[:64], digest_size=32).digest()


class Gatekeeper(grpc.aio.ServerInterceptor):
    """Refuses calls without the cluster's token, and those meant for another incarnation."""

    def __init__(self, secret: bytes, incarnation: str) -> None:
        self._token = call_token(secret)
        self._incarnation = incarnation

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        metadata = {key: str(value) for key, value in handler_call_details.invocation_metadata or ()}
        handler = await continuation(handler_call_details)
        if not hmac.compare_digest(metadata.get(SECRET_METADATA, "").encode(), self._token.encode()):
            return _refusal(handler, grpc.StatusCode.UNAUTHENTICATED, "the cluster's secret is missing or wrong", "")
        if metadata.get(INCARNATION_METADATA) != self._incarnation:
            message = f"this worker is now incarnation {self._incarnation}"
            return _refusal(handler, grpc.StatusCode.FAILED_PRECONDITION, message, StaleIncarnation.code)
        return handler


def _refusal(handler: Handler | None, status: grpc.StatusCode, message: str, code: str) -> Handler:
    """A handler of the same kind that only refuses."""
    trailing = ((CODE_METADATA, code),) if code else ()

    async def refuse(request: object, context: grpc.aio.ServicerContext) -> object:
        await context.abort(status, message, trailing)

    async def refuse_stream(request: object, context: grpc.aio.ServicerContext):
        await context.abort(status, message, trailing)
        yield b""

    if handler is not None and handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(refuse_stream)
    return grpc.unary_unary_rpc_method_handler(refuse)
