"""Records across protobuf, and errors, closed channels and refusals across real gRPC calls on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.rpc import convert, request_pb2, token_pb2
from cluster.rpc.auth import call_token, prefix_hash_key
from cluster.rpc.channels import Channels
from cluster.rpc.client import GrpcConnector, GrpcPeers, GrpcWorkerClient, worker_status
from cluster.rpc.server import WorkerServer
from cluster.sides import WorkerStatus
from decode_worker.totals import TransferTotals
from engine.errors import ERRORS, DeadlineExceeded, StaleIncarnation, SteelyardError, Unavailable, WorkerLost
from engine.step_shape import Chunk, StepRecord, StepShape
from engine.streams import StreamBatch
from engine.types import (
    CacheNews,
    CarrierTotals,
    Endpoint,
    EngineStats,
    ErrorInfo,
    FinishReason,
    Key,
    KvPath,
    KvTransfer,
    Move,
    Request,
    Role,
    SamplingParams,
    Submission,
    TokenOutput,
    TransferReport,
)
from kv_transfer.carriers.sample import Sample
from kv_transfer.lease import Lease, Loan, Offer
from router.membership import Member
from tests.kv_transfer.fakes import transfer
from tests.strategies import SAMPLING_PARAMS, SERVICES, TOKEN_LOGPROBS
from tests.virtual import until

U32, U64 = (st.integers(0, 2**bits - 1) for bits in (32, 64))
IDS = st.lists(U32, max_size=10).map(tuple)
FLOATS = st.floats(allow_nan=False)
TEXT = st.text(max_size=20)
KEYS = st.builds(Key, TEXT, U32)
ENDPOINTS = st.builds(Endpoint, TEXT, TEXT, TEXT, TEXT)
REQUESTS = st.builds(Request, TEXT, IDS, SAMPLING_PARAMS, U32, IDS, TEXT, FLOATS, SERVICES)
SIBLINGS = st.lists(st.tuples(KEYS, U32), max_size=3)
SUBMISSIONS = st.builds(
    lambda request, gateway_id, decode, siblings: Submission(
        request, gateway_id, decode, tuple(request.sibling(key, choice) for key, choice in siblings)
    ),
    REQUESTS, TEXT, st.none() | ENDPOINTS, SIBLINGS,
)  # fmt: skip
OFFERS = st.builds(
    Offer, st.builds(Lease, KEYS, TEXT, TEXT, TEXT, TEXT, TEXT), U32, U32, TEXT, FLOATS,
    st.lists(KEYS, max_size=3).map(tuple), st.lists(st.binary(max_size=16), max_size=4).map(tuple),
)  # fmt: skip
STATS = st.builds(EngineStats, **{each.name: U32 for each in fields(EngineStats)})
OUTPUTS = st.builds(
    TokenOutput, KEYS, U32, IDS, st.none() | st.sampled_from(FinishReason),
    st.none() | st.builds(ErrorInfo, st.text(min_size=1), TEXT), U32,
    st.lists(st.tuples(TEXT, FLOATS), max_size=3).map(tuple), TOKEN_LOGPROBS, TOKEN_LOGPROBS,
    st.none() | st.builds(KvTransfer, TEXT, U64, U64, FLOATS, FLOATS),
)  # fmt: skip
CHUNKS = st.lists(st.builds(Chunk, U32, U32), max_size=3).map(tuple)
STEPS = st.builds(StepRecord, st.builds(StepShape, CHUNKS, U32, U64), FLOATS)
RECORDS = st.lists(STEPS, max_size=3).map(tuple)
NAMES = st.lists(U64, max_size=4).map(tuple)
BATCHES = st.builds(
    StreamBatch, st.lists(OUTPUTS, max_size=4).map(tuple), STATS, RECORDS,
    cache=st.builds(CacheNews, NAMES, NAMES, st.booleans()), calibration=RECORDS,
)  # fmt: skip

SECRET = b"s" * 32
STATUS = WorkerStatus(
    Endpoint("d0", "i1", "a:1", "c"), Role.DECODE, 2, EngineStats(num_running=1), 3, 4, 5, 6,
    TransferTotals(7, 8, 9, 10, 1.5), 0.25,
)  # fmt: skip
SUBMISSION = Submission(Request("r", (1, 2, 3), SamplingParams()), "g0", None)
OFFER = Offer(Lease(Key("r", 0), "p0", "i1", "a:1", "c", "secret"), 3, 8, "g0", 60.0)


@given(SUBMISSIONS, U32)
def test_a_submission_crosses_unchanged(submission: Submission, role_epoch: int) -> None:
    wire = convert.submission_to(submission, role_epoch).SerializeToString()
    message = request_pb2.SubmitRequest.FromString(wire)
    assert convert.submission_from(message) == submission
    assert message.role_epoch == role_epoch


@given(OFFERS)
def test_an_offer_crosses_unchanged(offer: Offer) -> None:
    wire = convert.offer_to(offer).SerializeToString()
    assert convert.offer_from(request_pb2.OfferRequest.FromString(wire)) == offer


@given(BATCHES)
def test_a_batch_crosses_unchanged(batch: StreamBatch) -> None:
    wire = convert.batch_to(batch).SerializeToString()
    assert convert.batch_from(token_pb2.TokenBatch.FromString(wire)) == batch


@given(KEYS, ENDPOINTS, STATS)
def test_keys_endpoints_and_stats_cross_unchanged(key: Key, endpoint: Endpoint, stats: EngineStats) -> None:
    assert convert.key_from(convert.key_to(key)) == key
    assert convert.endpoint_from(convert.endpoint_to(endpoint)) == endpoint
    assert convert.stats_from(convert.stats_to(stats)) == stats


def test_every_field_of_the_stats_is_on_the_wire() -> None:
    assert {each.name for each in fields(EngineStats)} == {each.name for each in token_pb2.Stats.DESCRIPTOR.fields}


def test_what_travels_is_not_the_secret_and_differs_by_use() -> None:
    assert SECRET.hex() not in call_token(SECRET)
    assert call_token(SECRET) != prefix_hash_key(SECRET).hex()
    assert call_token(SECRET) != call_token(b"t" * 32)


# --- across a real call ---------------------------------------------------------------------------------------


@dataclass(eq=False)
class Called:
    """Implements WorkerCalls: notes what comes, or raises `error`."""

    error: SteelyardError | None = None
    calls: list[object] = field(default_factory=list)
    offer_may_return: asyncio.Event = field(default_factory=asyncio.Event)
    batches: list[StreamBatch] = field(default_factory=list)
    num_subscribers: int = 0
    lent: Loan | None = None

    def submit(self, submission: Submission, role_epoch: int) -> None:
        self._note((submission, role_epoch))

    async def abort(self, key: Key) -> None:
        self._note(key)

    async def take_offer(self, offer: Offer) -> None:
        self._note(offer)
        await self.offer_may_return.wait()

    async def move(self, move: Move) -> None:
        self._note(move)

    async def copy(self, loan: Loan) -> None:
        self._note(loan)

    async def borrow(self, names: tuple[bytes, ...]) -> Loan | None:
        self._note(names)
        return self.lent

    async def subscribe(self, gateway_id: str) -> AsyncGenerator[StreamBatch]:
        self.num_subscribers += 1
        try:
            for batch in self.batches:
                yield batch
            await asyncio.Event().wait()
        finally:
            self.num_subscribers -= 1

    def status(self) -> WorkerStatus:
        return STATUS

    def _note(self, call: object) -> None:
        self.calls.append(call)
        if self.error is not None:
            raise self.error


@dataclass(eq=False)
class Served:
    worker: Called
    server: WorkerServer
    member: Member
    channels: Channels

    @property
    def client(self) -> GrpcWorkerClient:
        return GrpcConnector(self.channels).connect(self.member)

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.member.worker_id, self.member.incarnation, self.member.address, self.member.cohort)


TRANSFERS = TransferReport((CarrierTotals("shm", 3, 2**40, 0.5, 1, 2**41, 2**39),), (KvPath("p0", "shm", 1e10),))


@asynccontextmanager
async def serve(secret: bytes = SECRET, error: SteelyardError | None = None) -> AsyncIterator[Served]:
    """A worker's real server, and channels of a peer that has this secret."""
    worker = Called(error)
    with transfer() as case:
        server = WorkerServer(SECRET, "i1")
        member = Member("d0", "i1", Role.DECODE, 0, server.bind("127.0.0.1"), "c")
        sample = Sample()
        await server.start(worker, case.outbox, sample)
        channels = Channels(secret)
        try:
            yield Served(worker, server, member, channels)
        finally:
            await channels.close()
            await server.stop()
            sample.close()


async def test_calls_arrive_as_the_records_that_were_sent() -> None:
    async with serve() as s:
        s.worker.offer_may_return.set()
        await s.client.submit(SUBMISSION, 3, 5.0)
        await s.client.abort(Key("r", 2), 5.0)
        await GrpcPeers(s.channels).offer(s.endpoint, OFFER, 5.0)
        assert s.worker.calls == [(SUBMISSION, 3), Key("r", 2), OFFER]
        assert await worker_status(s.channels, s.member.address, "i1", 5.0) == convert.status_to(STATUS)


@pytest.mark.parametrize("loan", [None, Loan(OFFER.lease, (b"one", b"two"))])
async def test_moves_and_loans_arrive_as_they_were_sent(loan: Loan | None) -> None:
    move = Move(Key("r", 1), Endpoint("d1", "i2", "127.0.0.1:3", "c"), None if loan is None else Key("r", 2), 7.0)
    async with serve() as s:
        s.worker.lent = loan
        peers = GrpcPeers(s.channels)
        await s.client.move(move, 5.0)
        assert await peers.borrow(s.endpoint, (b"a", b"b"), 5.0) == loan
        if loan is not None:
            await peers.copy(s.endpoint, loan, 5.0)
        assert s.worker.calls == [move, (b"a", b"b"), *([loan] if loan is not None else [])]


async def test_a_stream_of_batches_arrives_and_ends_at_the_worker_when_the_reader_leaves() -> None:
    async with serve() as s:
        s.worker.batches = [
            StreamBatch((TokenOutput(Key("r", 0), i, (i,)),), EngineStats(num_steps=i), transfers=TRANSFERS)
            for i in range(3)
        ]
        async with aclosing(s.client.tokens("g0")) as stream:
            assert [await anext(stream) for _ in range(3)] == s.worker.batches
            assert s.worker.num_subscribers == 1
        await until(lambda: s.worker.num_subscribers == 0)


@pytest.mark.parametrize("kind", ERRORS.values(), ids=ERRORS)
async def test_every_error_keeps_its_kind_across_a_call(kind: type[SteelyardError]) -> None:
    async with serve(error=kind("what went wrong: Ü")) as s:
        with pytest.raises(kind) as caught:
            await s.client.submit(SUBMISSION, 0, 5.0)
        assert type(caught.value) is kind
        assert caught.value.message == "what went wrong: Ü"
        with pytest.raises(kind) as caught:
            await GrpcPeers(s.channels).offer(s.endpoint, OFFER, 5.0)
        assert type(caught.value) is kind


async def test_nothing_is_done_for_a_caller_without_the_secret() -> None:
    async with serve(secret=b"x" * 32) as s:
        client = s.client
        for call in (
            client.submit(SUBMISSION, 0, 5.0), client.abort(Key("r", 0), 5.0),
            GrpcPeers(s.channels).offer(s.endpoint, OFFER, 5.0),
            worker_status(s.channels, s.member.address, "i1", 5.0), anext(client.tokens("g0")),
        ):  # fmt: skip
            with pytest.raises(Unavailable, match="secret"):
                await call
        assert s.worker.calls == []
        assert s.worker.num_subscribers == 0


async def test_a_call_for_another_incarnation_is_refused_by_kind() -> None:
    async with serve() as s:
        client = GrpcConnector(s.channels).connect(replace(s.member, incarnation="i0"))
        for call in (client.submit(SUBMISSION, 0, 5.0), client.abort(Key("r", 0), 5.0), anext(client.tokens("g0"))):
            with pytest.raises(StaleIncarnation, match="i1"):
                await call
        assert s.worker.calls == []


async def test_a_worker_that_is_gone_is_unavailable() -> None:
    async with serve() as s:
        await s.server.stop()
        for call in (s.client.submit(SUBMISSION, 0, 5.0), anext(s.client.tokens("g0"))):
            with pytest.raises(Unavailable):
                await call


async def test_a_stream_whose_worker_goes_ends_with_an_error() -> None:
    async with serve() as s:
        s.worker.batches = [StreamBatch((), EngineStats())]
        async with aclosing(s.client.tokens("g0")) as stream:
            await anext(stream)
            await s.server.stop()
            with pytest.raises(Unavailable):
                await anext(stream)


async def test_an_answer_that_does_not_come_is_a_deadline_exceeded_and_the_worker_stops_working_on_it() -> None:
    async with serve() as s:
        with pytest.raises(DeadlineExceeded):
            await GrpcPeers(s.channels).offer(s.endpoint, OFFER, 0.1)
        assert s.worker.calls == [OFFER]


async def test_a_channel_that_is_closed_under_a_call_loses_the_worker_and_cancels_nobody() -> None:
    async with serve() as s:
        s.worker.batches = [StreamBatch((), EngineStats())]
        offer = asyncio.ensure_future(GrpcPeers(s.channels).offer(s.endpoint, OFFER, 5.0))
        async with aclosing(s.client.tokens("g0")) as stream:
            await anext(stream)
            await until(lambda: bool(s.worker.calls))
            await s.client.close()
            with pytest.raises(WorkerLost):
                await offer
            with pytest.raises(WorkerLost):
                await anext(stream)


async def test_a_call_that_is_cancelled_is_cancelled() -> None:
    async with serve() as s:
        offer = asyncio.ensure_future(GrpcPeers(s.channels).offer(s.endpoint, OFFER, 5.0))
        await until(lambda: bool(s.worker.calls))
        offer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await offer


async def test_a_client_of_a_member_that_left_and_came_back_works() -> None:
    async with serve() as s:
        old, new = s.client, s.client
        await new.submit(SUBMISSION, 0, 5.0)
        await old.close()
        await new.submit(SUBMISSION, 0, 5.0)
        assert len(s.worker.calls) == 2


async def test_an_unknown_code_from_a_newer_peer_is_still_an_error_of_ours() -> None:
    class Newer(SteelyardError):
        code = "not_known_yet"
        status = 503

    async with serve(error=Newer("later")) as s:
        with pytest.raises(Unavailable, match="later"):
            await s.client.submit(SUBMISSION, 0, 5.0)
