"""Every method of every service of a worker, found in the generated files and in the tables of its server: who has no
secret, a wrong one, or means an earlier life of the worker is refused before anything is read or done.
"""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor

from cluster.rpc.auth import call_token
from cluster.rpc.channels import OPTIONS
from engine.streams import StreamBatch
from engine.types import EngineStats
from kv_transfer.carrier import Producer
from kv_transfer.carriers.grpc import SERVICE, kv_handler
from kv_transfer.carriers.status import CODE_METADATA, INCARNATION_METADATA, SECRET_METADATA
from tests.cluster.test_rpc import SECRET, Served, serve

RIGHT = {SECRET_METADATA: call_token(SECRET), INCARNATION_METADATA: "i1"}
REFUSED = {
    "no secret": ({INCARNATION_METADATA: "i1"}, "UNAUTHENTICATED", ""),
    "nothing at all": ({}, "UNAUTHENTICATED", ""),
    "an empty secret": (RIGHT | {SECRET_METADATA: ""}, "UNAUTHENTICATED", ""),
    "a wrong secret": (RIGHT | {SECRET_METADATA: call_token(b"x" * 32)}, "UNAUTHENTICATED", ""),
    "the secret itself": (RIGHT | {SECRET_METADATA: SECRET.decode()}, "UNAUTHENTICATED", ""),
    "a wrong secret, and an earlier life": (
        {SECRET_METADATA: call_token(b"x" * 32), INCARNATION_METADATA: "i0"}, "UNAUTHENTICATED", "",
    ),
    "an earlier life": (RIGHT | {INCARNATION_METADATA: "i0"}, "FAILED_PRECONDITION", "stale_incarnation"),
    "no life": ({SECRET_METADATA: call_token(SECRET)}, "FAILED_PRECONDITION", "stale_incarnation"),
}  # fmt: skip


def described() -> dict[str, bool]:
    """Of each method in cluster/rpc/*.proto: does it answer with a stream?"""
    names = sorted(path.stem for path in Path("cluster/rpc").glob("*_pb2.py"))
    files = [importlib.import_module(f"cluster.rpc.{name}").DESCRIPTOR for name in names]
    services = [service for file in files for service in file.services_by_name.values()]
    return {_path(method): method.server_streaming for service in services for method in service.methods}


def _path(method: MethodDescriptor) -> str:
    assert not method.client_streaming, "the gatekeeper refuses calls of one message only"
    return f"/{method.containing_service.full_name}/{method.name}"


def of_transfers() -> dict[str, bool]:
    """The same of the service that has no .proto: its messages are frames."""
    handlers = vars(kv_handler(cast(Producer, None)))["_method_handlers"]  # nobody calls them
    return {path: bool(handler.response_streaming) for path, handler in handlers.items()}


METHODS = described() | of_transfers()
each_method = pytest.mark.parametrize("path", METHODS)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serve() as one:
        one.worker.offer_may_return.set()
        yield one


async def status_of(served: Served, path: str, metadata: dict[str, str], body: bytes = b"") -> tuple[str, str]:
    """(gRPC's name of it, our code) of a call; ("OK", "") if its first answer comes."""
    async with grpc.aio.insecure_channel(served.member.address, options=OPTIONS) as channel:
        try:
            if METHODS.get(path, False):
                stream = channel.unary_stream(path)(body, metadata=tuple(metadata.items()), timeout=5)
                await stream.read()
                stream.cancel()
            else:
                await channel.unary_unary(path)(body, metadata=tuple(metadata.items()), timeout=5)
        except grpc.aio.AioRpcError as error:
            code = dict(error.trailing_metadata() or ()).get(CODE_METADATA, "")
            return error.code().name, str(code)
    return "OK", ""


def num_done(served: Served) -> int:
    return len(served.worker.calls) + served.worker.num_subscribers


@each_method
async def test_a_call_is_refused_before_it_is_read(served: Served, path: str) -> None:
    for who, (metadata, status, code) in REFUSED.items():
        for body in (b"", b"\xff" * 9):
            assert await status_of(served, path, metadata, body) == (status, code), who
    assert num_done(served) == 0


@each_method
async def test_the_same_call_by_a_peer_is_heard(served: Served, path: str) -> None:
    """Else the refusals would show nothing."""
    served.worker.batches = [StreamBatch((), EngineStats())]
    status, _ = await status_of(served, path, RIGHT)
    assert status not in ("UNAUTHENTICATED", "FAILED_PRECONDITION", "UNIMPLEMENTED")


async def test_the_table_has_every_service_and_an_unknown_method_is_refused_like_the_others(served: Served) -> None:
    services = {path.split("/")[1] for path in METHODS}
    assert services == {"steelyard.Requests", "steelyard.Tokens", "steelyard.Control", SERVICE}
    for path in ("/steelyard.Requests/Nothing", "/no.such/Method"):
        assert await status_of(served, path, {}) == ("UNAUTHENTICATED", "")
        assert await status_of(served, path, RIGHT) == ("UNIMPLEMENTED", "")
