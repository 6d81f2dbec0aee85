"""Client stubs: gRPC calls that fit router's and prefill's Protocols."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import ClassVar

import grpc

from cluster.rpc import control_pb2, control_pb2_grpc, convert, request_pb2, request_pb2_grpc, token_pb2, token_pb2_grpc
from cluster.rpc.channels import Channels
from engine.streams import StreamBatch
from engine.types import Endpoint, EngineStats, Key, Move, Submission
from kv_transfer.carriers.status import typed_errors
from kv_transfer.lease import Loan, Offer
from router.membership import Member
from router.trace_context import trace_headers


class GrpcWorkerClient:
    """Implements router.workers.WorkerClient."""

    stats_stand: ClassVar[bool] = True

    def __init__(self, member: Member, channels: Channels) -> None:
        self._member = member
        self._channels = channels

    async def submit(self, submission: Submission, role_epoch: int, timeout_s: float) -> None:
        with typed_errors():
            message = convert.submission_to(submission, role_epoch)
            await self._requests().Submit(message, timeout=timeout_s, metadata=trace_headers())

    async def abort(self, key: Key, timeout_s: float) -> None:
        with typed_errors():
            await self._requests().Abort(request_pb2.AbortRequest(key=convert.key_to(key)), timeout=timeout_s)

    async def move(self, move: Move, timeout_s: float) -> None:
        with typed_errors():
            await self._requests().Move(convert.move_to(move), timeout=timeout_s)

    async def tokens(self, gateway_id: str) -> AsyncGenerator[StreamBatch]:
        with typed_errors():
            call = token_pb2_grpc.TokensStub(self._channel()).Subscribe(token_pb2.TokensRequest(gateway_id=gateway_id))
            try:
                async for message in call:
                    yield convert.batch_from(message)
            finally:
                call.cancel()

    def stats_by_now(self, told: EngineStats) -> EngineStats:
        return told

    async def close(self) -> None:
        await self._channels.forget(self._member.address, self._member.incarnation)

    def _requests(self) -> request_pb2_grpc.RequestsStub:
        return request_pb2_grpc.RequestsStub(self._channel())

    def _channel(self) -> grpc.aio.Channel:
        """Asked for at each call: whoever left the membership and came back has a new one."""
        return self._channels(self._member.address, self._member.incarnation)


class GrpcConnector:
    """Implements router.workers.Connector."""

    def __init__(self, channels: Channels) -> None:
        self._channels = channels

    def connect(self, member: Member) -> GrpcWorkerClient:
        return GrpcWorkerClient(member, self._channels)


class GrpcPeers:
    """Implements prefill_worker.side.DecodePeers and decode_worker.mover.MovePeers."""

    def __init__(self, channels: Channels) -> None:
        self._channels = channels

    async def offer(self, target: Endpoint, offer: Offer, timeout_s: float) -> None:
        with typed_errors():
            await self._requests(target).Offer(convert.offer_to(offer), timeout=timeout_s)

    async def copy(self, target: Endpoint, loan: Loan, timeout_s: float) -> None:
        with typed_errors():
            await self._requests(target).Copy(convert.loan_to(loan), timeout=timeout_s)

    async def borrow(self, source: Endpoint, names: tuple[bytes, ...], timeout_s: float) -> Loan | None:
        with typed_errors():
            reply = await self._requests(source).Borrow(request_pb2.BorrowRequest(names=names), timeout=timeout_s)
        return convert.loan_from(reply.loan) if reply.HasField("loan") else None

    def _requests(self, worker: Endpoint) -> request_pb2_grpc.RequestsStub:
        return request_pb2_grpc.RequestsStub(self._channels(worker.address, worker.incarnation))


async def worker_status(
    channels: Channels, address: str, incarnation: str, timeout_s: float
) -> control_pb2.WorkerStatus:
    """One worker's own account of itself."""
    stub = control_pb2_grpc.ControlStub(channels(address, incarnation))
    with typed_errors():
        return await stub.Status(control_pb2.StatusRequest(), timeout=timeout_s)
