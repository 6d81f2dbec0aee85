"""The gRPC carrier over loopback: a real server with the cluster's gatekeeper, a real outbox, real channels."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace

import grpc
import msgpack
import pytest

from cluster.rpc.auth import Gatekeeper
from cluster.rpc.channels import OPTIONS, Channels
from engine.errors import LeaseLost, TransferFailed
from engine.planes import attention_layout
from kv_transfer.carriers.grpc import MAX_RUNS, SERVICE, GrpcCarriers, kv_handler
from kv_transfer.carriers.status import CODE_METADATA
from kv_transfer.config import MAX_FRAME_BYTES
from kv_transfer.lease import Lease
from kv_transfer.pull import Puller
from tests.kv_transfer.fakes import LAYOUT, PRODUCER, Transfer, transfer
from tests.virtual import until

SECRET = b"s" * 32


@dataclass(eq=False)
class Served:
    """One transfer behind a real server; `lease` has the server's address."""

    case: Transfer
    server: grpc.aio.Server
    lease: Lease
    channels: Channels

    async def pull(self, lease: Lease | None = None, timeout_s: float = 5.0):
        lease = lease or self.lease
        carrier = GrpcCarriers(self.channels).carrier(lease)
        case = self.case
        return await Puller(case.target.layout, case.target, case.target_ids, carrier, lease).run(timeout_s)


@asynccontextmanager
async def serve(case: Transfer, secret: bytes = SECRET) -> AsyncIterator[Served]:
    gatekeeper = Gatekeeper(SECRET, PRODUCER.incarnation)
    server = grpc.aio.server(interceptors=[gatekeeper], options=OPTIONS)
    server.add_generic_rpc_handlers((kv_handler(case.outbox),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    channels = Channels(secret)
    try:
        yield Served(case, server, replace(case.lease, address=address), channels)
    finally:
        await channels.close()
        await server.stop(grace=None)


@pytest.fixture
async def case() -> AsyncIterator[Transfer]:
    with transfer() as case:
        yield case


def committed(case: Transfer) -> Transfer:
    case.compute(case.num_tokens)
    case.commit()
    return case


async def test_blocks_cross_a_real_link(case: Transfer) -> None:
    async with serve(case) as served:
        pull = asyncio.ensure_future(served.pull())
        for computed in range(4, case.num_tokens, 4):
            for num_layers in (1, 2, None):
                await asyncio.sleep(0.002)
                case.compute(computed, num_layers)
        case.commit()
        assert (await pull).num_resumes == 0
        assert all(case.arrived())
        assert case.others_untouched()


@pytest.mark.parametrize("frame_bytes", [2**20, MAX_FRAME_BYTES])
async def test_the_largest_frames_fit_the_link(frame_bytes: int) -> None:
    layout = attention_layout(num_layers=8, num_kv_heads=8, head_dim=64, block_size=16, dtype="float32")
    with transfer(256, frame_bytes, layout) as case:
        async with serve(committed(case)) as served:
            pulled = await served.pull()
            assert pulled.size_bytes == 16 * layout.bytes_per_block == 8 * 2**20
            assert pulled.num_frames == -(-4 * 2**20 // frame_bytes) * 2
            assert all(case.arrived())


async def test_a_pull_with_a_wrong_cluster_secret_is_refused(case: Transfer) -> None:
    async with serve(committed(case), secret=b"x" * 32) as served:
        with pytest.raises(TransferFailed, match="secret"):
            await served.pull()
        assert not any(case.arrived())


async def test_every_call_with_a_wrong_cluster_secret_is_unauthenticated(case: Transfer) -> None:
    async with serve(case, secret=b"x" * 32) as served:
        channel = served.channels(served.lease.address, PRODUCER.incarnation)
        for method in ("Release", "Renew", "NoSuchMethod"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(f"/{SERVICE}/{method}")(b"", timeout=5)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_stream(f"/{SERVICE}/Pull")(b"").read()
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert case.outbox.num_leases == 1


async def test_a_lease_of_another_incarnation_is_lost(case: Transfer) -> None:
    async with serve(committed(case)) as served:
        with pytest.raises(LeaseLost, match="incarnation"):
            await served.pull(replace(served.lease, incarnation="i0"))


async def test_the_caller_learns_by_code_that_an_incarnation_is_over(case: Transfer) -> None:
    async with serve(case) as served:
        channel = served.channels(served.lease.address, "i0")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(f"/{SERVICE}/Renew")(b"", timeout=5)
        assert dict(caught.value.trailing_metadata() or ())[CODE_METADATA] == "stale_incarnation"


async def test_a_wrong_lease_secret_gets_nothing(case: Transfer) -> None:
    async with serve(committed(case)) as served:
        stranger = replace(served.lease, secret="guess")
        with pytest.raises(LeaseLost):
            await served.pull(stranger)
        await GrpcCarriers(served.channels).carrier(stranger).release(stranger)
        assert case.outbox.num_leases == 1
        assert not any(case.arrived())


def row(**changes: object) -> list[object]:
    fields = {
        "id": "r",
        "epoch": 0,
        "worker": "p0",
        "incarnation": "i1",
        "address": "a:1",
        "cohort": "c",
        "secret": "s",
    }
    return list((fields | changes).values())


@pytest.mark.parametrize(
    "record",
    [
        b"", b"\xff" * 40, b"\x93", None, 5, [], [[]], [[row()]], [[row()], 0], [[], 0, []], [[row()], -1, []],
        [[row()], "x", []], [[5], 0, []], [[row()[:4]], 0, []], [[row(epoch="x")], 0, []],
        [[row(epoch=float("inf"))], 0, []], [[row()], float("inf"), []], [[row()], float("nan"), []],
        [[{"r": 1}], 0, []], [{"r": 1}, 0, []], [[row(epoch=None)], 0, []], [[row()], 0, [], 0],
        [[row()], 0, 0], [[row()], 0, None], [[row()], 0, "01"], [[row()], 0, [0]], [[row()], 0, [0, "1"]],
        [[row()], 0, [0, True]], [[row()], 0, [-1, 2]], [[row()], 0, [2, 1]], [[row()], 0, [1, 1]],
        [[row()], 0, [0, 2, 1, 3]], [[row()], 0, [0, 2, 2, 3]], [[row()], 0, [0.0, 1.0]], [[row()], 0, {0: 1, 2: 3}],
        [[row()], 0, list(range(2 * MAX_RUNS + 2))],
    ],
    ids=lambda record: str(record)[:90],
)  # fmt: skip
async def test_a_malformed_record_is_a_typed_refusal_and_the_server_lives_on(case: Transfer, record: object) -> None:
    data = record if isinstance(record, bytes) else msgpack.packb(record)
    async with serve(committed(case)) as served:
        channel = served.channels(served.lease.address, PRODUCER.incarnation)
        for method in ("Release", "Renew"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(f"/{SERVICE}/{method}")(data, timeout=5)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_stream(f"/{SERVICE}/Pull")(data).read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert case.outbox.num_leases == 1
        await served.pull()
        assert all(case.arrived())


async def test_a_frame_that_was_never_sent_cannot_be_asked_for(case: Transfer) -> None:
    async with serve(committed(case)) as served:
        carrier = GrpcCarriers(served.channels).carrier(served.lease)
        with pytest.raises(TransferFailed, match="only 0 were ever sent"):
            async with aclosing(carrier.pull(served.lease, 7)) as stream:
                await anext(stream)


async def test_a_server_that_dies_in_the_middle_fails_the_pull(case: Transfer) -> None:
    async with serve(case) as served:
        pull = asyncio.ensure_future(served.pull())
        case.compute(9)
        await until(lambda: case.arrived()[0])
        await served.server.stop(grace=None)
        with pytest.raises(TransferFailed):
            await pull
        assert case.others_untouched()


async def test_a_channel_that_is_closed_under_a_pull_fails_it_without_cancelling_it(case: Transfer) -> None:
    async with serve(case) as served:
        pull = asyncio.ensure_future(served.pull())
        case.compute(9)
        await until(lambda: case.arrived()[0])
        await served.channels.close()
        with pytest.raises(TransferFailed):
            await pull


async def test_cancelling_a_pull_cancels_it(case: Transfer) -> None:
    async with serve(case) as served:
        pull = asyncio.ensure_future(served.pull())
        case.compute(9)
        await until(lambda: case.arrived()[0])
        pull.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pull


async def test_a_lease_that_ends_while_a_reader_waits_reaches_it_as_lease_lost(case: Transfer) -> None:
    async with serve(case) as served:
        pull = asyncio.ensure_future(served.pull())
        case.compute(9)
        await until(lambda: case.arrived()[0])
        case.outbox.close(case.lease.key)
        with pytest.raises(LeaseLost):
            await pull


async def test_release_and_renew_reach_the_outbox(case: Transfer) -> None:
    async with serve(case) as served:
        carrier = GrpcCarriers(served.channels).carrier(served.lease)
        await carrier.renew([served.lease, replace(served.lease, secret="guess")])
        assert case.outbox.num_leases == 1
        await carrier.release(served.lease)
        await carrier.release(served.lease)
        assert (case.outbox.num_leases, case.ended) == (0, [case.lease.key])


async def test_a_producer_that_cannot_be_reached_is_a_failed_transfer(case: Transfer) -> None:
    async with serve(case) as served:
        await served.server.stop(grace=None)
        carrier = GrpcCarriers(served.channels).carrier(served.lease)
        for call in (carrier.release(served.lease), carrier.renew([served.lease])):
            with pytest.raises(TransferFailed):
                await call


def test_the_layout_of_these_tests_is_small() -> None:
    assert LAYOUT.bytes_per_block == 768
