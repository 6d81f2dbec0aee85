"""Shared memory between real processes' ends: a real door, a real server, real maps; and the way back to gRPC."""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import secrets
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import grpc
import pytest

from cluster.rpc.auth import Gatekeeper, call_token
from cluster.rpc.channels import OPTIONS, Channels
from engine.errors import LeaseLost, TransferFailed
from engine.pool import SharedPool
from engine.runs import Runs
from kv_transfer.carrier import Producer
from kv_transfer.carriers import choice, door
from kv_transfer.carriers.choice import ChosenCarriers
from kv_transfer.carriers.door import OpenPool, PoolDoor, open_pool
from kv_transfer.carriers.grpc import kv_handler
from kv_transfer.carriers.sample import SAMPLE_BYTES, Sample
from kv_transfer.carriers.shm import copy_rate
from kv_transfer.config import TransferConfig
from kv_transfer.frames import Commit, Place
from kv_transfer.lease import Lease
from kv_transfer.pull import Pulled, Puller
from prefill_worker.outbox import Outbox
from tests.kv_transfer.fakes import LAYOUT, NUM_BLOCKS, PRODUCER, Transfer, transfer

SECRET = b"s" * 32
TOKEN = call_token(SECRET)
FAST = 1e12  # bytes per second, beyond any that gRPC brings


@dataclass(eq=False)
class Served:
    case: Transfer
    server: grpc.aio.Server
    lease: Lease
    channels: Channels
    carriers: ChosenCarriers
    sample: Sample
    door: PoolDoor | None

    async def pull(self) -> Pulled:
        case, carrier = self.case, self.carriers.carrier(self.lease)
        return await Puller(case.target.layout, case.target, case.target_ids, carrier, self.lease).run(5.0)


@asynccontextmanager
async def serve(
    case: Transfer, config: TransferConfig | None = None, outbox: Producer | None = None, has_door: bool = True
) -> AsyncIterator[Served]:
    incarnation, sample = case.lease.incarnation, Sample()
    server = grpc.aio.server(interceptors=[Gatekeeper(SECRET, incarnation)], options=OPTIONS)
    server.add_generic_rpc_handlers((kv_handler(outbox or case.outbox, sample),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    opened = PoolDoor(case.source, sample.fd, TOKEN, incarnation) if has_door else None
    channels = Channels(SECRET)
    carriers = ChosenCarriers(channels, LAYOUT, TOKEN, config or TransferConfig())
    try:
        yield Served(case, server, replace(case.lease, address=address), channels, carriers, sample, opened)
    finally:
        await carriers.close()
        await channels.close()
        await server.stop(grace=None)
        if opened is not None:
            await opened.close()
        sample.close()


@pytest.fixture
async def case() -> AsyncIterator[Transfer]:
    """Each with a life of its own, whose name no other test has."""
    with transfer(producer=replace(PRODUCER, incarnation=secrets.token_hex(8))) as case:
        yield case


@pytest.fixture(autouse=True)
def shm_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample is copied and checked as ever, but how long that takes does not count: it is 2 ms or so, and what else
    runs on the processor meanwhile can make gRPC the faster of the two."""

    def fast(opened: OpenPool, digest: int) -> float:
        copy_rate(opened, digest)
        return FAST

    monkeypatch.setattr(choice, "copy_rate", fast)


def committed(case: Transfer) -> Transfer:
    case.compute(case.num_tokens)
    case.commit()
    return case


def num_maps() -> int:
    """Maps of pools in this process."""
    with open("/proc/self/maps") as maps:
        return sum("memfd:steelyard-kv" in line for line in maps)


# --- the way of a transfer -----------------------------------------------------------------------------------


async def test_blocks_are_copied_out_of_the_producers_pool_while_it_computes(case: Transfer) -> None:
    async with serve(case) as served:
        pull = asyncio.ensure_future(served.pull())
        for computed in range(4, case.num_tokens, 4):
            for num_layers in (1, 2, None):
                await asyncio.sleep(0.002)
                case.compute(computed, num_layers)
        case.commit()
        pulled = await pull
        assert (pulled.carrier, pulled.num_resumes) == ("shm", 0)
        assert all(case.arrived())
        assert case.others_untouched()
        assert {path.carrier for path in served.carriers.paths()} == {"shm", "grpc"}
        assert all(path.bytes_per_s > 1e6 and path.peer == PRODUCER.worker_id for path in served.carriers.paths())


async def test_a_pair_is_measured_once_and_let_go_of_when_it_is_idle(
    case: Transfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serve(committed(case)) as served:
        before = num_maps()
        await served.pull()
        await served.pull()
        assert num_maps() == before + 1
        monkeypatch.setattr(choice, "IDLE_S", -1.0)
        served.carriers._forget(served.lease)
        assert num_maps() == before
        assert served.carriers.paths() == ()
        assert (await served.pull()).carrier == "shm"


@pytest.mark.parametrize(("carrier", "expected"), [("grpc", "grpc"), ("shm", "shm"), ("auto", "shm")])
async def test_the_configuration_says_what_may_carry(case: Transfer, carrier: str, expected: str) -> None:
    async with serve(committed(case), TransferConfig.model_validate({"carrier": carrier})) as served:
        before = num_maps()
        assert (await served.pull()).carrier == expected
        assert num_maps() == before + (expected == "shm")
        assert all(case.arrived())


# --- refusals --------------------------------------------------------------------------------------------------


async def test_without_a_door_on_this_host_grpc_carries(case: Transfer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kv_transfer")
    async with serve(committed(case), has_door=False) as served:
        assert (await served.pull()).carrier == "grpc"
        assert "not shm: no pool of" in caplog.text


async def test_a_pool_that_must_be_shared_and_cannot_be_is_an_error(case: Transfer) -> None:
    async with serve(committed(case), TransferConfig(carrier="shm"), has_door=False) as served:
        with pytest.raises(
            TransferFailed, match="no carrier from p0: grpc: the configuration excludes it; shm: no pool"
        ):
            await served.pull()
        assert not any(case.arrived())


async def test_carriers_below_the_floor_are_refused(case: Transfer) -> None:
    async with serve(committed(case), TransferConfig(min_gb_per_s=1e6)) as served:
        with pytest.raises(TransferFailed, match=r"shm: .* GB/s is below kv_transfer.min_gb_per_s"):
            await served.pull()


async def test_a_reader_with_another_secret_is_sent_away(case: Transfer, caplog: pytest.LogCaptureFixture) -> None:
    async with serve(case) as served:
        with pytest.raises(TransferFailed, match="does not know the cluster's secret"):
            await open_pool(LAYOUT, call_token(b"x" * 32), served.lease.incarnation)
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(stranger, f"\0steelyard-kv-{served.lease.incarnation}")
            await loop.sock_sendall(stranger, bytes(32))
            assert len(await loop.sock_recv(stranger, 64)) == 64
            await loop.sock_sendall(stranger, bytes(32))
            assert await loop.sock_recv(stranger, 64) == b""
        assert "a reader of the pool was sent away: it does not know the cluster's secret" in caplog.text


async def test_a_silent_visitor_holds_nobody_up(case: Transfer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "DOOR_TIMEOUT_S", 0.2)
    async with serve(committed(case)) as served:
        with socket.socket(socket.AF_UNIX) as silent:
            silent.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(silent, f"\0steelyard-kv-{served.lease.incarnation}")
            assert (await served.pull()).carrier == "shm"
            assert await asyncio.wait_for(loop.sock_recv(silent, 1), 2.0) == b"", "it was let go of"


async def test_a_door_that_could_not_open_once_opens_again(case: Transfer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "ACCEPT_PAUSE_S", 0.05)
    loop, errors = asyncio.get_running_loop(), [OSError(24, "Too many open files")]
    accept = loop.sock_accept

    async def fails_once(sock: socket.socket) -> tuple[socket.socket, Any]:
        if errors:
            raise errors.pop()
        return await accept(sock)

    monkeypatch.setattr(loop, "sock_accept", fails_once)
    async with serve(committed(case)) as served:
        assert (await served.pull()).carrier == "shm"
        assert not errors


async def test_what_comes_through_the_door_cannot_be_written_to(case: Transfer) -> None:
    async with serve(case) as served:
        opened = await open_pool(LAYOUT, TOKEN, served.lease.incarnation)
        assert isinstance(opened.pool, SharedPool)
        assert opened.pool.memory[:] == case.source.memory[:]
        with pytest.raises(PermissionError):
            mmap.mmap(opened.pool.fd, opened.pool.size_bytes, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(OSError, match="Invalid argument"):
            os.ftruncate(opened.pool.fd, 0)
        assert opened.sample[:] == served.sample.memory[:]
        assert len(opened.sample) == SAMPLE_BYTES
        opened.close()


async def test_of_a_producer_that_lives_again_the_old_memory_is_let_go_of(case: Transfer) -> None:
    async with serve(committed(case)) as served:
        before = num_maps()
        await served.pull()
        assert num_maps() == before + 1
        served.lease = replace(served.lease, incarnation="another")
        with pytest.raises(LeaseLost, match="incarnation"):
            await served.pull()
        assert num_maps() == before


async def test_a_lease_that_is_over_is_lost_by_shared_memory_too(case: Transfer) -> None:
    async with serve(committed(case)) as served:
        served.case.outbox.close(case.lease.key)
        with pytest.raises(LeaseLost):
            await served.pull()


# --- failures --------------------------------------------------------------------------------------------------


class Misplaced(Outbox):
    """Tells of wrong places, as a producer would whose blocks have gone to somebody else."""

    def _wrong(self, block_id: int) -> int:
        return (block_id + 1) % NUM_BLOCKS

    async def places(
        self, lease: Lease, first_frame: int, present: Runs = ()
    ) -> AsyncGenerator[tuple[Place, ...] | Commit]:
        async for message in super().places(lease, first_frame, present):
            if isinstance(message, Commit):
                yield message
            else:
                yield tuple(replace(one, block_ids=tuple(map(self._wrong, one.block_ids))) for one in message)


class OutOfBounds(Misplaced):
    def _wrong(self, block_id: int) -> int:
        return block_id + 10**6


@pytest.mark.parametrize("kind", [Misplaced, OutOfBounds])
async def test_wrong_bytes_are_found_out_and_the_other_carrier_goes_on(
    case: Transfer, kind: type[Outbox], caplog: pytest.LogCaptureFixture
) -> None:
    outbox = committed(case).outbox
    outbox.__class__ = kind
    async with serve(case, outbox=outbox) as served:
        pulled = await served.pull()
        assert (pulled.carrier, pulled.num_resumes) == ("grpc", 2)
        assert all(case.arrived())
        assert case.others_untouched()
        assert served.carriers.num_fallbacks == {"shm": 1}
        assert "KV from p0 comes by another carrier: shm failed" in caplog.text
        assert (await served.pull()).carrier == "grpc", "until the pair is measured anew"


async def test_a_frame_where_a_place_was_wanted_is_refused(case: Transfer) -> None:
    class Confused(Outbox):
        async def places(self, lease: Lease, first_frame: int, present: Runs = ()) -> AsyncGenerator[Any]:
            async for message in self.messages(lease, first_frame, present):
                yield message

    outbox = committed(case).outbox
    outbox.__class__ = Confused
    async with serve(case, TransferConfig(carrier="shm"), outbox=outbox) as served:
        with pytest.raises(TransferFailed, match="its place was wanted"):
            await served.pull()


async def test_a_producer_that_goes_in_the_midst_fails_the_pull_and_its_memory_is_let_go_of(case: Transfer) -> None:
    case.compute(8)
    before = num_maps()
    async with serve(case) as served:
        pull = asyncio.ensure_future(served.pull())
        while num_maps() == before:  # noqa: ASYNC110 (another thread of control maps it)
            await asyncio.sleep(0.01)
        await served.server.stop(grace=None)
        with pytest.raises(TransferFailed):
            await pull
    assert num_maps() == before
