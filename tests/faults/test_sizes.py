"""What is larger than it may be, or says that it is: a typed error, and channel, worker and peer go on."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

import grpc
import pytest

from cluster.rpc import request_pb2
from cluster.rpc.channels import MAX_MESSAGE_BYTES, OPTIONS
from cluster.rpc.client import worker_status
from engine.errors import FrameCorrupt, SteelyardError, TransferFailed, Unavailable
from engine.streams import StreamBatch
from engine.types import EngineStats, Key, Request, SamplingParams, Submission, TokenOutput
from kv_transfer.carriers.grpc import SERVICE, GrpcCarrier
from kv_transfer.carriers.shm import ShmCarrier
from kv_transfer.frames import HEADER_BYTES, encode
from kv_transfer.pull import Pulled, Puller
from tests.cluster.test_rpc import SUBMISSION, Served, serve
from tests.faults.test_calls import RIGHT
from tests.kv_transfer.fakes import LAYOUT, Transfer, transfer
from tests.kv_transfer.test_shm_carrier import committed

UNLIMITED = (("grpc.max_send_message_length", -1),)
HUGE = bytes(MAX_MESSAGE_BYTES + 1)
MANY_TOKENS = tuple(range(2**15, 2**15 + 2_000_000))  # three bytes each on the wire
each_carrier = pytest.mark.parametrize("carrier", ["grpc", "shm"])


@dataclass(eq=False)
class Producer:
    """Answers each pull with these bytes, whatever they are."""

    case: Transfer
    carrier: GrpcCarrier
    right: Sequence[bytes]
    answers: Sequence[bytes] = ()

    async def pull(self) -> Pulled:
        case = self.case
        return await Puller(LAYOUT, case.target, case.target_ids, self.carrier, case.lease).run(5.0)

    async def answer(self, _request: bytes, _context: grpc.aio.ServicerContext) -> AsyncGenerator[bytes]:
        for one in self.answers:
            yield one


@asynccontextmanager
async def producing(carrier: str) -> AsyncIterator[Producer]:
    """Its server may send what nobody may receive."""
    with transfer() as case:
        outbox = committed(case).outbox
        sent = outbox.messages(case.lease, 0) if carrier == "grpc" else outbox.places(case.lease, 0)
        right = [b"".join(map(encode, one)) if isinstance(one, tuple) else encode(one) async for one in sent]
        server = grpc.aio.server(options=UNLIMITED)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
            kind = GrpcCarrier(channel) if carrier == "grpc" else ShmCarrier(channel, case.source)
            producer = Producer(case, kind, right)
            handler = grpc.unary_stream_rpc_method_handler(producer.answer)
            handlers = {"Pull": handler, "Places": handler}
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
            await server.start()
            yield producer
            await server.stop(grace=None)


async def fails_and_goes_on(producer: Producer, answers: Sequence[bytes], kind: type[SteelyardError]) -> None:
    producer.answers = answers
    with pytest.raises(kind):
        await producer.pull()
    assert not any(producer.case.arrived()) and producer.case.others_untouched()
    producer.answers = producer.right
    assert (await producer.pull()).num_resumes == 0
    assert all(producer.case.arrived())


@each_carrier
@pytest.mark.parametrize("length", [0, 2**31, 2**63, 2**64 - 1])
async def test_a_header_that_claims_another_length_than_follows(carrier: str, length: int) -> None:
    async with producing(carrier) as producer:
        first, *rest = producer.right
        claiming = first[: HEADER_BYTES - 8] + length.to_bytes(8, "little") + first[HEADER_BYTES:]
        await fails_and_goes_on(producer, [claiming, *rest], FrameCorrupt)


@each_carrier
async def test_a_message_of_a_transfer_over_the_limit(carrier: str) -> None:
    async with producing(carrier) as producer:
        await fails_and_goes_on(producer, [HUGE], TransferFailed)


# --- calls of a worker -----------------------------------------------------------------------------------------


async def goes_on(served: Served) -> None:
    await served.client.submit(SUBMISSION, 1, 5.0)
    assert served.worker.calls == [(SUBMISSION, 1)]
    assert (await worker_status(served.channels, served.member.address, "i1", 5.0)).num_queued


async def test_a_submission_over_the_limit_is_not_sent() -> None:
    async with serve() as served:
        huge = Submission(Request("r", MANY_TOKENS, SamplingParams()), "g0", None)
        with pytest.raises(Unavailable, match="larger than max"):
            await served.client.submit(huge, 0, 5.0)
        await goes_on(served)


async def test_a_message_over_the_limit_that_is_sent_all_the_same_is_not_read() -> None:
    async with serve() as served:
        async with grpc.aio.insecure_channel(served.member.address, options=UNLIMITED) as channel:
            submit = channel.unary_unary("/steelyard.Requests/Submit")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await submit(HUGE, metadata=tuple(RIGHT.items()), timeout=5)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            done = await submit(request_pb2.SubmitRequest().SerializeToString(), metadata=tuple(RIGHT.items()))
            assert request_pb2.Done.FromString(done) is not None
        served.worker.calls.clear()
        await goes_on(served)


async def test_a_batch_of_tokens_over_the_limit_ends_its_stream_and_the_next_one_is_served() -> None:
    async with serve() as served:
        served.worker.batches = [StreamBatch((TokenOutput(Key("r", 0), 0, MANY_TOKENS),), EngineStats())]
        async with aclosing(served.client.tokens("g0")) as stream:
            with pytest.raises(Unavailable, match="larger than max"):
                await anext(stream)
        served.worker.batches = [StreamBatch((), EngineStats(num_steps=1))]
        async with aclosing(served.client.tokens("g0")) as stream:
            assert await anext(stream) == served.worker.batches[0]
        await goes_on(served)
