"""Server shells: gRPC calls of one worker, turned into calls of a plain object."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Protocol

import grpc

from cluster.rpc import control_pb2, control_pb2_grpc, convert, request_pb2, request_pb2_grpc, token_pb2, token_pb2_grpc
from cluster.rpc.auth import Gatekeeper
from cluster.rpc.channels import OPTIONS
from cluster.rpc.tls import Tls
from cluster.sides import WorkerStatus
from engine.errors import SteelyardError
from engine.streams import StreamBatch
from engine.types import Key, Move, Submission
from kv_transfer.carrier import Producer
from kv_transfer.carriers.distributed.service import DistService, dist_handler
from kv_transfer.carriers.grpc import kv_handler
from kv_transfer.carriers.sample import Sample
from kv_transfer.carriers.status import abort_with
from kv_transfer.lease import Loan, Offer

log = logging.getLogger(__name__)


class WorkerCalls(Protocol):
    """What a worker answers (cluster/sides.py)."""

    def submit(self, submission: Submission, role_epoch: int) -> None: ...

    async def abort(self, key: Key) -> None: ...

    async def take_offer(self, offer: Offer) -> None: ...

    async def move(self, move: Move) -> None: ...

    async def copy(self, loan: Loan) -> None: ...

    async def borrow(self, names: tuple[bytes, ...]) -> Loan | None: ...

    def subscribe(self, gateway_id: str) -> AsyncGenerator[StreamBatch]: ...

    def status(self) -> WorkerStatus: ...


class _Requests(request_pb2_grpc.RequestsServicer):
    def __init__(self, worker: WorkerCalls) -> None:
        self._worker = worker

    async def Submit(self, request: request_pb2.SubmitRequest, context: grpc.aio.ServicerContext) -> request_pb2.Done:
        trace = dict(context.invocation_metadata() or ()).get("traceparent")
        log.debug("request %s: trace %s", request.request.key.request_id, trace)
        try:
            self._worker.submit(convert.submission_from(request), request.role_epoch)
        except SteelyardError as error:
            await abort_with(context, error)
        return request_pb2.Done()

    async def Abort(self, request: request_pb2.AbortRequest, context: grpc.aio.ServicerContext) -> request_pb2.Done:
        await self._worker.abort(convert.key_from(request.key))
        return request_pb2.Done()

    async def Offer(self, request: request_pb2.OfferRequest, context: grpc.aio.ServicerContext) -> request_pb2.Done:
        try:
            await self._worker.take_offer(convert.offer_from(request))
        except SteelyardError as error:
            await abort_with(context, error)
        return request_pb2.Done()

    async def Move(self, request: request_pb2.MoveRequest, context: grpc.aio.ServicerContext) -> request_pb2.Done:
        try:
            await self._worker.move(convert.move_from(request))
        except SteelyardError as error:
            await abort_with(context, error)
        return request_pb2.Done()

    async def Copy(self, request: request_pb2.Loan, context: grpc.aio.ServicerContext) -> request_pb2.Done:
        try:
            await self._worker.copy(convert.loan_from(request))
        except SteelyardError as error:
            await abort_with(context, error)
        return request_pb2.Done()

    async def Borrow(
        self, request: request_pb2.BorrowRequest, context: grpc.aio.ServicerContext
    ) -> request_pb2.BorrowReply:
        loan: Loan | None = None
        try:
            loan = await self._worker.borrow(tuple(request.names))
        except SteelyardError as error:
            await abort_with(context, error)
        return request_pb2.BorrowReply(loan=None if loan is None else convert.loan_to(loan))


class _Tokens(token_pb2_grpc.TokensServicer):
    def __init__(self, worker: WorkerCalls) -> None:
        self._worker = worker

    async def Subscribe(
        self, request: token_pb2.TokensRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[token_pb2.TokenBatch]:
        async with aclosing(self._worker.subscribe(request.gateway_id)) as batches:
            async for batch in batches:
                yield convert.batch_to(batch)


class _Control(control_pb2_grpc.ControlServicer):
    def __init__(self, worker: WorkerCalls) -> None:
        self._worker = worker

    async def Status(
        self, request: control_pb2.StatusRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.WorkerStatus:
        return convert.status_to(self._worker.status())


class WorkerServer:
    """One worker's gRPC server, on a port that the system chooses."""

    def __init__(self, secret: bytes, incarnation: str, tls: Tls | None = None) -> None:
        self._credentials = tls.for_server() if tls is not None else None
        self._server = grpc.aio.server(interceptors=[Gatekeeper(secret, incarnation)], options=OPTIONS)

    def bind(self, host: str) -> str:
        """Take a port; returns host:port."""
        if self._credentials is None:
            port = self._server.add_insecure_port(f"{host}:0")
        else:
            port = self._server.add_secure_port(f"{host}:0", self._credentials)
        return f"{host}:{port}"

    async def start(
        self, worker: WorkerCalls, producer: Producer, sample: Sample, dist: DistService | None = None
    ) -> None:
        """Begin to answer."""
        request_pb2_grpc.add_RequestsServicer_to_server(_Requests(worker), self._server)
        token_pb2_grpc.add_TokensServicer_to_server(_Tokens(worker), self._server)
        control_pb2_grpc.add_ControlServicer_to_server(_Control(worker), self._server)
        self._server.add_generic_rpc_handlers((kv_handler(producer, sample),))
        if dist is not None:
            self._server.add_generic_rpc_handlers((dist_handler(dist),))
        await self._server.start()

    async def stop(self) -> None:
        """Open streams are ended at once."""
        await self._server.stop(grace=0.2)
