"""The dist carrier between two porters on loopback: real processes, real gloo, a real server; and what follows faults.

Porters take seconds to load torch, so all tests share two of them, and one event loop. What one test kills is there
again for the next: a worker's Porters see to it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import secrets
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import grpc
import msgpack
import pytest
import pytest_asyncio

from cluster.rpc.auth import Gatekeeper, call_token
from cluster.rpc.channels import OPTIONS, Channels
from engine.errors import LeaseLost, TransferFailed
from engine.pool import SharedPool
from engine.runs import Runs
from kv_transfer.carriers import choice
from kv_transfer.carriers.choice import ChosenCarriers, Pair
from kv_transfer.carriers.distributed.link_end import LinkEnd
from kv_transfer.carriers.distributed.porters import Porters
from kv_transfer.carriers.distributed.records import MAX_LINKS, TOKEN_BYTES, PorterSetup
from kv_transfer.carriers.distributed.service import NAME_BYTES, SERVICE, DistService, dist_handler, pack_meeting
from kv_transfer.carriers.grpc import kv_handler
from kv_transfer.carriers.sample import Sample
from kv_transfer.config import TransferConfig
from kv_transfer.lease import Lease
from kv_transfer.pull import Pulled, Puller
from prefill_worker.outbox import Outbox
from tests.faults.relay import HEALED, relay_to
from tests.faults.test_links import FAULTS, HARMLESS
from tests.kv_transfer.fakes import (
    FRAME_BYTES,
    KEY,
    LAYOUT,
    NUM_BLOCKS,
    PRODUCER,
    TTL_S,
    Link,
    Transfer,
    poisoned_pool,
    random_pool,
)
from tests.kv_transfer.test_shm_carrier import Misplaced, OutOfBounds, committed
from tests.virtual import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

SECRET = b"s" * 32
PORTER_TIMEOUT_S = 1.5
NUM_TOKENS = 60  # 15 of the 16 blocks
NAME, TOKEN = "n" * NAME_BYTES, b"t" * TOKEN_BYTES


@dataclass(eq=False)
class Workers:
    """Their porters, and the producer's pool."""

    pool: SharedPool
    sample: Sample
    producer: Porters
    consumer: Porters


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def workers() -> AsyncIterator[Workers]:
    samples, pools = [Sample(), Sample()], [random_pool(), random_pool(seed=1)]
    setup = PorterSetup(LAYOUT, NUM_BLOCKS, 1, "127.0.0.1", "cpu", 2**19, PORTER_TIMEOUT_S)
    both = [Porters(setup, pool, sample) for pool, sample in zip(pools, samples, strict=True)]
    for porters in both:
        porters.begin()
    await asyncio.gather(*(porters.ready() for porters in both))
    yield Workers(pools[0], samples[0], *both)
    for porters in both:
        await porters.stop()
    for each in (*pools, *samples):
        each.close()


@dataclass(eq=False)
class Served:
    """One transfer behind a real server; `lease` has the server's address."""

    case: Transfer
    lease: Lease
    channels: Channels
    carriers: ChosenCarriers

    async def pair(self) -> Pair:
        """Measured, and dist is found to be the fastest."""
        pair = await self.carriers.pair(self.lease)
        pair.rates["dist"] = 1e15
        return pair

    async def pull(self, present: Runs = (), timeout_s: float = 5.0) -> Pulled:
        case, carrier = self.case, self.carriers.carrier(self.lease)
        puller = Puller(LAYOUT, case.target, case.target_ids, carrier, self.lease, present=present)
        return await puller.run(timeout_s)


@asynccontextmanager
async def serve(workers: Workers, carrier: str = "dist", has_dist: bool = True) -> AsyncIterator[Served]:
    await asyncio.gather(workers.producer.ready(), workers.consumer.ready())
    order, ended = random.Random(0), []
    source_ids, target_ids = (tuple(order.sample(range(NUM_BLOCKS), NUM_TOKENS // LAYOUT.block_size)) for _ in range(2))
    outbox = Outbox(LAYOUT, workers.pool, FRAME_BYTES, TTL_S, lambda: "secret", ended.append)
    server = grpc.aio.server(interceptors=[Gatekeeper(SECRET, incarnation := secrets.token_hex(8))], options=OPTIONS)
    server.add_generic_rpc_handlers((kv_handler(outbox, workers.sample),))
    if has_dist:
        server.add_generic_rpc_handlers((dist_handler(DistService(outbox, workers.producer)),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    lease = outbox.grant(KEY, replace(PRODUCER, incarnation=incarnation, address=address))
    target, channels = poisoned_pool(), Channels(SECRET)
    case = Transfer(
        workers.pool, target, outbox, lease, Link(outbox), NUM_TOKENS, source_ids, target_ids, ended
    )  # fmt: skip
    config = TransferConfig.model_validate({"carrier": carrier})
    carriers = ChosenCarriers(channels, LAYOUT, call_token(SECRET), config, workers.consumer)
    try:
        yield Served(case, lease, channels, carriers)
    finally:
        await carriers.close()
        await channels.close()
        await server.stop(grace=None)
        target.close()


# --- the way of a transfer -----------------------------------------------------------------------------------


async def test_blocks_cross_the_link_while_they_are_computed(workers: Workers) -> None:
    async with serve(workers) as served:
        pull = asyncio.ensure_future(served.pull())
        for computed in range(4, NUM_TOKENS, 4):
            await asyncio.sleep(0.005)
            served.case.compute(computed)
        served.case.commit()
        pulled = await pull
        assert (pulled.carrier, pulled.num_resumes) == ("dist", 0)
        assert all(served.case.arrived())
        assert served.case.others_untouched()
        (path,) = served.carriers.paths()
        assert path.carrier == "dist" and path.bytes_per_s > 1e6


async def test_one_link_carries_several_pulls_and_what_is_there_already_does_not_move(workers: Workers) -> None:
    async with serve(workers) as served:
        committed(served.case)
        present = (range(0, 3), range(5, 6))
        first, second = await asyncio.gather(served.pull(present), served.pull(present))
        assert first.size_bytes == second.size_bytes == 11 * LAYOUT.bytes_per_block
        assert served.case.arrived() == [index not in (0, 1, 2, 5) for index in range(15)]
        link = (await served.pair()).link
        assert link is not None and link.end.num_pulls == 3, "and the sample"


async def test_a_pool_that_cannot_be_mapped_is_sent_all_the_same(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers.producer, "is_mapped", False)
    async with serve(workers) as served:
        committed(served.case)
        assert (await served.pull()).num_resumes == 0
        assert all(served.case.arrived())


async def test_a_pull_that_is_given_up_leaves_the_link_as_it_was(workers: Workers) -> None:
    async with serve(workers) as served:
        pair = await served.pair()
        for num_tokens in (20, 40):
            pull = asyncio.ensure_future(served.pull())
            served.case.compute(num_tokens)
            await until(lambda: served.case.arrived()[0])
            pull.cancel()
            with pytest.raises(asyncio.CancelledError):
                await pull
        served.case.commit()
        assert (await served.pull()).num_resumes == 0
        assert all(served.case.arrived())
        assert pair.link is not None and not pair.link.is_over
        assert not pair.link.end.arrivals


# --- refusals --------------------------------------------------------------------------------------------------


async def test_a_lease_that_is_over_is_lost(workers: Workers) -> None:
    async with serve(workers) as served:
        await served.pair()
        committed(served.case).outbox.close(KEY)
        with pytest.raises(LeaseLost):
            await served.pull()


async def test_who_has_no_porters_is_pulled_from_by_another_carrier(
    workers: Workers, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kv_transfer")
    async with serve(workers, "all", has_dist=False) as served:
        committed(served.case)
        assert (await served.pull()).carrier == "grpc"
        assert "not dist: a peer could not be reached" in caplog.text


async def test_members_that_do_not_know_the_same_token_part_at_once(workers: Workers) -> None:
    consumer, producer = await asyncio.gather(workers.consumer.ready(), workers.producer.ready())
    ours = consumer.open_link(NAME, TOKEN, is_producer=False)
    theirs = producer.open_link(NAME, bytes(TOKEN_BYTES), True, await ours.said)
    consumer.tell(ours, await theirs.said)
    for end in (ours, theirs):
        with pytest.raises(TransferFailed, match=r"does not know the link's token|closed by peer"):
            await end.opened
    assert [end.row for end in consumer._links.values()] == []


async def test_a_porter_has_so_many_links_and_those_that_never_meet_end(workers: Workers) -> None:
    consumer = await workers.consumer.ready()
    ends = [consumer.open_link(f"{index:016}", TOKEN, is_producer=False) for index in range(MAX_LINKS)]
    with pytest.raises(TransferFailed, match="64 links already"):
        consumer.open_link(NAME, TOKEN, is_producer=False)
    for end in ends[::2]:
        consumer.close_link(end)
    await until(lambda: not consumer._links)
    assert not consumer.has_ended


async def test_slots_that_a_pull_still_reads_are_given_to_no_other_link(workers: Workers) -> None:
    consumer = await workers.consumer.ready()

    async def ended(name: str) -> LinkEnd:
        end = consumer.open_link(name * NAME_BYTES, TOKEN, is_producer=False)
        consumer.close_link(end)
        await until(lambda: end.reason is not None)
        return end

    first = await ended("1")
    first.arrivals[1] = asyncio.Queue()
    assert (await ended("2")).row != first.row
    del first.arrivals[1]
    assert (await ended("3")).row == first.row


MEETING = [NAME, TOKEN, 2**19, []]


@pytest.mark.parametrize(
    ("method", "data", "code"),
    [
        *(
            ("Meet", wrong, grpc.StatusCode.INVALID_ARGUMENT)
            for wrong in (
                b"", b"\xff", 5, [], ["x", *MEETING[1:]], [NAME, b"t", 2**19, []], [NAME, TOKEN, None, []],
                [NAME, TOKEN, 2**19, 0], [NAME, TOKEN, 2**19, [1]], [NAME, TOKEN, 2**19, [["k", "text"]]],
                [NAME, TOKEN, 2**19, [["k", bytes(4097)]]], [NAME, TOKEN, 2**19, [["k", b""]] * 17],
                ["\xe9" * NAME_BYTES, *MEETING[1:]],
            )
        ),
        ("Meet", pack_meeting(NAME, TOKEN, 2**18, ()), grpc.StatusCode.INTERNAL),
        ("Sample", b"short", grpc.StatusCode.INVALID_ARGUMENT),
        ("Sample", b"\xff" * 20, grpc.StatusCode.INVALID_ARGUMENT),
        ("Sample", b"x" * 20, grpc.StatusCode.INTERNAL),
    ],
)  # fmt: skip
async def test_malformed_and_unfitting_requests_are_typed_refusals(
    workers: Workers, method: str, data: object, code: grpc.StatusCode
) -> None:
    async with serve(workers) as served:
        call = served.channels(served.lease.address, served.lease.incarnation).unary_unary(f"/{SERVICE}/{method}")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(data if isinstance(data, bytes) else msgpack.packb(data), timeout=5)
        assert caught.value.code() is code
        committed(served.case)
        assert (await served.pull()).carrier == "dist"


# --- failures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Misplaced, OutOfBounds])
async def test_wrong_bytes_are_found_out_and_another_carrier_goes_on(
    workers: Workers, kind: type[Outbox], caplog: pytest.LogCaptureFixture
) -> None:
    """Who orders what does not exist ends the porter."""
    async with serve(workers, "all") as served:
        await served.pair()
        committed(served.case).outbox.__class__ = kind
        pulled = await served.pull()
        assert (pulled.carrier, pulled.num_resumes) == ("grpc", 2)
        assert all(served.case.arrived())
        assert served.carriers.num_fallbacks == {"dist": 1}
        assert "KV from p0 comes by another carrier: dist failed" in caplog.text


@pytest.mark.parametrize("kind", FAULTS)
async def test_whatever_happens_to_the_rpc_beside_the_link(workers: Workers, kind: str) -> None:
    """The members of a group connect to each other: the relay is between the workers, and not between them."""
    async with serve(workers) as served, relay_to(served.lease.address) as (relay, address):
        served.lease = replace(served.lease, address=address)
        await served.pair()
        relay.set(FAULTS[kind])
        pull = asyncio.ensure_future(served.pull(timeout_s=0.3))
        served.case.compute(20)
        served.case.commit()
        try:
            await pull
        except TransferFailed:
            assert kind not in HARMLESS
        else:
            assert all(served.case.arrived())
        assert served.case.others_untouched()
        relay.set(HEALED)
        relay.reset()
        served.lease = served.case.lease
        assert (await served.pull()).carrier == "dist", "the link was not hurt, or there is a new one"
        assert all(served.case.arrived())


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "silent"])
async def test_a_porter_that_fails_in_the_midst_is_replaced_and_the_pull_goes_on(
    workers: Workers, sign: signal.Signals, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(choice, "AGAIN_S", 0.0)
    async with serve(workers, "all") as served:
        pair = await served.pair()
        failed = await workers.producer.ready()
        pull = asyncio.ensure_future(served.pull())
        served.case.compute(20)
        await until(lambda: served.case.arrived()[0])
        os.kill(failed.pid, sign)
        served.case.compute(40)
        served.case.commit()
        pulled = await pull
        assert (pulled.carrier, served.carriers.num_fallbacks) == ("grpc", {"dist": 1})
        assert all(served.case.arrived())
        assert f"the porter process {failed.pid} " in caplog.text
        assert "another one is started" in caplog.text
        with pytest.raises(ProcessLookupError):
            os.kill(failed.pid, 0)
        replaced = await workers.producer.ready()
        assert replaced.pid != failed.pid
        assert (await served.pull()).carrier == "grpc", "dist is measured beside it"
        await until(lambda: "dist" in pair.rates, 30.0)
        await served.pair()
        assert (await served.pull()).carrier == "dist"
        assert all(served.case.arrived())


async def test_a_link_that_was_the_only_way_is_made_anew(workers: Workers) -> None:
    async with serve(workers) as served:
        committed(served.case)
        await served.pull()
        failed = await workers.consumer.ready()
        os.kill(failed.pid, signal.SIGKILL)
        await until(lambda: failed.has_ended)
        assert (await served.pull()).carrier == "dist"
        assert all(served.case.arrived())


async def test_porters_that_cannot_start_fail_each_transfer_and_say_why(
    workers: Workers, caplog: pytest.LogCaptureFixture
) -> None:
    setup = replace(workers.producer.setup, frame_bytes=2**50)  # no memory for its ring
    porters = Porters(setup, workers.pool, workers.sample)
    for _ in range(2):
        with pytest.raises(TransferFailed, match="a porter process could not be started"):
            await porters.ready()
    assert "KV cannot go by dist: " in caplog.text
    await porters.stop()


async def test_nothing_is_left_of_porters_that_were_stopped(workers: Workers) -> None:
    pids = []
    async with serve(workers) as served:
        committed(served.case)
        await served.pull()
        for porters in (workers.consumer, workers.producer):
            pids.append((await porters.ready()).pid)
            await porters.stop()
        with pytest.raises(TransferFailed, match="the porters were stopped"):
            await served.pull(timeout_s=0.5)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
