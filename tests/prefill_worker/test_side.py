from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest

from engine.errors import LeaseLost, Overloaded, SteelyardError, Unavailable
from engine.step_shape import Chunk, StepRecord, StepShape
from engine.streams import TokenStreams
from engine.types import (
    Abort,
    Add,
    Command,
    Endpoint,
    EngineStats,
    ErrorInfo,
    FinishReason,
    Key,
    Progress,
    Release,
    Request,
    SamplingParams,
    Service,
    StepOutputs,
    Submission,
    TokenOutput,
)
from kv_transfer.frames import Commit, Frame
from kv_transfer.handoff import HandOff
from kv_transfer.lease import Lease, Offer
from prefill_worker.forecast import Forecast
from prefill_worker.outbox import Outbox
from prefill_worker.queue import PrefillQueue, QueueRules
from prefill_worker.side import PrefillSide
from tests.kv_transfer.fakes import FRAME_BYTES, LAYOUT, NUM_BLOCKS, PRODUCER, TTL_S, random_pool
from tests.virtual import in_virtual_time, settle

GATEWAY = "g0"
DECODE = Endpoint("d0", "j1", "127.0.0.1:2", PRODUCER.cohort)
KEY = Key("r", 0)
STATS = EngineStats(num_blocks=NUM_BLOCKS)
BLOCKS = (5, 3, 9)  # of a prompt of 10 tokens
STEP_TOKENS = 40
BACKLOG = 8  # prompts: two steps of them
PACE = StepRecord(StepShape((Chunk(0, 100),), 0, 0), 1.0)  # 10 ms a token


@dataclass(eq=False)
class Peers:
    """Decode workers that answer an offer when the test says so. Implements DecodePeers."""

    offers: list[Offer] = field(default_factory=list)
    answers: list[asyncio.Future[None]] = field(default_factory=list)
    num_cancelled: int = 0

    async def offer(self, target: Endpoint, offer: Offer, timeout_s: float) -> None:
        assert target == DECODE
        self.offers.append(offer)
        self.answers.append(asyncio.get_running_loop().create_future())
        try:
            async with asyncio.timeout(timeout_s):
                await self.answers[-1]
        except TimeoutError:
            raise Unavailable("no answer") from None
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise

    def accept(self) -> None:
        self.answers[-1].set_result(None)

    def refuse(self, error: SteelyardError) -> None:
        self.answers[-1].set_exception(error)


@dataclass
class Prefixes:
    """Fetches that end when a test says so."""

    begun: list[tuple[str, Endpoint, float]] = field(default_factory=list)
    worth: list[Callable[[int, float | None], bool]] = field(default_factory=list)
    ends: list[asyncio.Future[None]] = field(default_factory=list)

    async def fetch(
        self, request: Request, source: Endpoint, is_worth: Callable[[int, float | None], bool], timeout_s: float
    ) -> None:
        self.begun.append((request.request_id, source, timeout_s))
        self.worth.append(is_worth)
        self.ends.append(asyncio.get_running_loop().create_future())
        await self.ends[-1]


class House:
    """A prefill side between a fake engine (a list of commands) and a reader of its stream."""

    def __init__(self, outbox: Outbox, max_queue: int) -> None:
        self.sent: list[Command] = []
        self.outbox = outbox
        self.peers = Peers()
        self.streams = TokenStreams(1e6, lambda key: None)
        self.prefixes = Prefixes()
        self.side = PrefillSide(
            PRODUCER, PrefillQueue(QueueRules(max_queue)), outbox, self.streams, self.peers, self.sent.append,
            self.prefixes, token_bytes=1000.0, forecast=Forecast(256, 512, knee_tokens=STEP_TOKENS),
        )  # fmt: skip

    def submit(
        self, name: str = "r", decode: Endpoint | None = DECODE, max_tokens: int = 8, source: Endpoint | None = None,
        **fields: object,
    ) -> None:  # fmt: skip
        request = Request(name, tuple(range(10)), SamplingParams(max_tokens=max_tokens), **fields)  # type: ignore[arg-type]
        self.side.submit(Submission(request, GATEWAY, decode, source=source))

    def turn(self, *news: TokenOutput | Progress, stats: EngineStats = STATS) -> tuple[TokenOutput, ...]:
        """One turn of the engine, as the worker distributes it."""
        tokens = tuple(one for one in news if isinstance(one, TokenOutput))
        progress = tuple(one for one in news if isinstance(one, Progress))
        out = self.side.on_outputs(StepOutputs(tokens, progress, stats=stats))
        self.streams.publish(out, stats)
        return out

    async def start(self) -> None:
        """Submitted, and its first chunk scheduled."""
        self.submit()
        self.turn(Progress(KEY, 0, BLOCKS))
        await settle()

    async def to_commit(self) -> None:
        await self.start()
        self.peers.accept()
        await settle()
        self.turn(Progress(KEY, 8, BLOCKS))
        self.turn(TokenOutput(KEY, 0, (42,)), Progress(KEY, 10, BLOCKS, done=True))

    async def told(self) -> list[TokenOutput]:
        """What the gateway reads, once nothing more happens."""
        await settle()
        stream = self.streams.subscribe(GATEWAY)
        await anext(stream)
        outputs = (await anext(stream)).outputs
        await stream.aclose()
        return list(outputs)

    @property
    def lease(self) -> Lease:
        return self.peers.offers[-1].lease

    def is_clean(self) -> bool:
        return (self.outbox.num_leases, self.streams.num_keys, self.side.num_queued, len(self.side._live)) == (
            0,
            0,
            0,
            0,
        )


@contextmanager
def house(max_queue: int = 100) -> Iterator[House]:
    pool = random_pool()
    outbox = Outbox(LAYOUT, pool, FRAME_BYTES, TTL_S, lambda: "secret", lambda key: built.side.on_lease_end(key))
    built = House(outbox, max_queue)
    try:
        yield built
    finally:
        pool.close()


def is_error(output: TokenOutput, code: str) -> bool:
    return output.finish is FinishReason.ERROR and output.error is not None and output.error.code == code


# --- the way of a request that goes well ----------------------------------------------------------------------


@in_virtual_time
async def test_a_request_is_added_offered_published_committed_and_released_in_this_order() -> None:
    with house() as h:
        h.submit()
        assert h.sent == [Add(Request("r", tuple(range(10)), SamplingParams(max_tokens=8)), handoff=True)]
        assert h.outbox.num_leases == 0
        h.turn(Progress(KEY, 0, BLOCKS, names=(b"first", b"second")))
        await settle()
        (offer,) = h.peers.offers
        assert (offer.num_tokens, offer.num_growth, offer.gateway_id) == (10, 8, GATEWAY)
        assert offer.names == (b"first", b"second")
        h.peers.accept()
        h.turn(Progress(KEY, 8, BLOCKS))
        stream = h.outbox.messages(offer.lease, 0)
        await anext(stream)
        h.turn(TokenOutput(KEY, 0, (42,), cached_tokens=4), Progress(KEY, 10, BLOCKS, done=True))
        *_, commit = [message async for message in stream]
        assert isinstance(commit, Commit)
        handoff = HandOff.decode(commit.handoff)
        assert handoff.request.generated_ids == (42,)
        assert (handoff.computed, handoff.cached_tokens, handoff.gateway_id) == (10, 4, GATEWAY)
        assert len(h.sent) == 1
        h.outbox.release(offer.lease)
        assert h.sent[1:] == [Release(KEY)]
        assert [output.token_ids for output in await h.told()] == [(42,)]
        assert h.is_clean()


@in_virtual_time
async def test_a_submission_that_comes_twice_is_taken_once() -> None:
    with house() as h:
        await h.start()
        h.submit()
        assert [type(command) for command in h.sent] == [Add]
        h.peers.accept()
        h.turn(Progress(KEY, 8, BLOCKS))
        h.turn(TokenOutput(KEY, 0, (42,)), Progress(KEY, 10, BLOCKS, done=True))
        h.submit()
        h.outbox.release(h.lease)
        assert [type(command) for command in h.sent] == [Add, Release]
        await h.told()
        assert h.is_clean()


@in_virtual_time
async def test_one_that_comes_again_while_all_of_it_runs_here_is_not_begun_again() -> None:
    with house() as h:
        h.submit(decode=None)
        h.turn(TokenOutput(KEY, 0, (42,)))
        h.submit(decode=None)
        assert [type(command) for command in h.sent] == [Add]
        h.turn(TokenOutput(KEY, 1, (43,), FinishReason.LENGTH))
        await h.told()
        assert h.is_clean()


@in_virtual_time
async def test_the_hand_off_says_for_how_long_its_blocks_had_been_leaving() -> None:
    with house() as h:
        h.submit()
        h.turn(Progress(KEY, 0, ()))
        await settle()
        h.peers.accept()
        h.turn(Progress(KEY, 0, BLOCKS, num_layers=1))

        async def pull() -> list[Frame | Commit]:
            return [message async for message in h.outbox.messages(h.lease, 0)]

        pulling = asyncio.ensure_future(pull())
        await asyncio.sleep(3)
        h.turn(TokenOutput(KEY, 0, (42,)), Progress(KEY, 10, BLOCKS, done=True))
        *_, commit = await pulling
        assert isinstance(commit, Commit)
        assert HandOff.decode(commit.handoff).overlap_s == 3.0


@in_virtual_time
async def test_the_hand_off_carries_what_is_left_of_the_deadline_and_the_gateway_hears_the_stages() -> None:
    with house() as h:
        h.submit(timeout_s=60.0)
        await asyncio.sleep(2)
        h.turn(Progress(KEY, 0, BLOCKS))
        await settle()
        assert h.peers.offers[0].timeout_s == pytest.approx(58)
        h.peers.accept()
        await asyncio.sleep(3)
        (output,) = h.turn(TokenOutput(KEY, 0, (42,)), Progress(KEY, 10, BLOCKS, done=True))
        assert dict(output.stages) == pytest.approx({"prefill_queue": 2.0, "prefill": 3.0})
        *_, commit = [message async for message in h.outbox.messages(h.lease, 0)]
        assert isinstance(commit, Commit)
        assert HandOff.decode(commit.handoff).request.timeout_s == pytest.approx(55)


@in_virtual_time
async def test_tokens_that_the_client_has_already_travel_on() -> None:
    with house() as h:
        h.submit(generated_ids=(7, 8))
        h.turn(Progress(KEY, 0, BLOCKS))
        await settle()
        assert (h.peers.offers[0].num_tokens, h.peers.offers[0].num_growth) == (12, 6)
        h.peers.accept()
        h.turn(TokenOutput(KEY, 2, (42,)), Progress(KEY, 12, BLOCKS, done=True))
        *_, commit = [message async for message in h.outbox.messages(h.lease, 0)]
        assert isinstance(commit, Commit)
        assert HandOff.decode(commit.handoff).request.generated_ids == (7, 8, 42)


@in_virtual_time
async def test_a_first_token_that_is_the_last_needs_no_decode_worker() -> None:
    with house() as h:
        await h.start()
        h.turn(TokenOutput(KEY, 0, (2,), FinishReason.STOP))
        h.peers.accept()
        with pytest.raises(LeaseLost):
            await anext(h.outbox.messages(h.lease, 0))
        (told,) = await h.told()
        assert (told.token_ids, told.finish) == ((2,), FinishReason.STOP)
        assert len(h.sent) == 1
        assert h.is_clean()


@pytest.mark.parametrize(("max_tokens", "generated"), [(1, ()), (3, (7, 8))])
@in_virtual_time
async def test_a_request_for_one_token_more_is_not_handed_off(max_tokens: int, generated: tuple[int, ...]) -> None:
    with house() as h:
        h.submit(max_tokens=max_tokens, generated_ids=generated)
        (add,) = h.sent
        assert isinstance(add, Add) and not add.handoff
        h.turn(TokenOutput(KEY, len(generated), (42,), FinishReason.LENGTH))
        assert h.peers.offers == []
        assert h.is_clean()


@in_virtual_time
async def test_without_a_decode_worker_all_of_it_runs_here() -> None:
    with house() as h:
        h.submit(decode=None)
        (add,) = h.sent
        assert isinstance(add, Add) and not add.handoff
        for index in range(3):
            finish = FinishReason.LENGTH if index == 2 else None
            (output,) = h.turn(TokenOutput(KEY, index, (index,), finish))
            assert bool(output.stages) == (index == 0)
        assert [output.token_ids for output in await h.told()] == [(0,), (1,), (2,)]
        assert h.is_clean()


# --- how much the engine is given -----------------------------------------------------------------------------


@in_virtual_time
async def test_the_engine_gets_a_backlog_and_the_next_as_one_starts() -> None:
    with house() as h:
        for index in range(BACKLOG + 3):
            h.submit(f"r{index}")
        assert len(h.sent) == BACKLOG
        assert (h.side.num_queued, h.side.num_queued_tokens) == (3, 30)
        h.turn(Progress(Key("r0", 0), 0, BLOCKS))
        assert len(h.sent) == BACKLOG, "it is being computed"
        h.turn(TokenOutput(Key("r0", 0), 0, (42,)))
        assert len(h.sent) == BACKLOG + 1


@in_virtual_time
async def test_what_the_queue_would_make_late_is_refused_and_keeps_nothing() -> None:
    with house() as h:
        h.side.on_outputs(StepOutputs(stats=STATS, steps=(PACE,)))
        for index in range(20):
            h.submit(f"r{index}")  # 0.1 s each
        assert h.side.queued_s == pytest.approx(2.0)
        with pytest.raises(Overloaded) as caught:
            h.submit("late", service=Service(ttft_s=0.75))
        assert caught.value.retry_after_s == pytest.approx(0.8 + 0.1 - 0.75), "the engine has eight"
        assert (h.streams.num_keys, h.side.num_queued) == (20, 12)
        h.submit("urgent", service=Service(ttft_s=0.95))  # goes before those that wait
        h.submit("late anyway", service=Service(ttft_s=0.05))
        h.submit("goes on", service=Service(ttft_s=0.5), generated_ids=(1,))
        await asyncio.sleep(0.05)
        assert h.side.queued_s == pytest.approx(2.25 + 0.01)


@in_virtual_time
async def test_generated_tokens_are_charged_to_their_tenant() -> None:
    with house() as h:
        for index in range(BACKLOG):
            h.submit(f"r{index}", decode=None, max_tokens=10**6, service=Service("a"))
        h.submit("a", service=Service("a", ttft_s=60.0))
        h.submit("b", service=Service("b", ttft_s=90.0))
        for index in range(5):
            h.turn(TokenOutput(Key("r1", 0), index, tuple(range(600))))
        assert isinstance(h.sent[-1], Add) and h.sent[-1].request.request_id == "b"


@in_virtual_time
async def test_requests_wait_while_decode_does_not_take_the_results_away() -> None:
    with house() as h:
        h.turn(stats=EngineStats(num_blocks=100, num_held_blocks=50))
        h.submit()
        assert h.sent == []
        h.turn(stats=EngineStats(num_blocks=100, num_held_blocks=30))
        assert len(h.sent) == 1


@in_virtual_time
async def test_a_full_queue_refuses_and_keeps_nothing() -> None:
    with house(max_queue=1) as h:
        h.turn(stats=EngineStats(num_blocks=100, num_held_blocks=50))
        h.submit("a")
        with pytest.raises(Overloaded):
            h.submit("b")
        assert (h.streams.num_keys, h.side.num_queued) == (1, 1)


# --- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [Overloaded("full"), Unavailable("gone")])
@in_virtual_time
async def test_a_refusal_before_the_commit_tells_the_gateway_once_and_frees_the_blocks(error: SteelyardError) -> None:
    with house() as h:
        await h.start()
        h.turn(Progress(KEY, 8, BLOCKS))
        h.peers.refuse(error)
        await settle()
        assert h.sent[1:] == [Abort(KEY)]
        h.turn(TokenOutput(KEY, 0, (), FinishReason.ABORT))  # the engine's answer to the Abort
        (told,) = await h.told()
        assert is_error(told, "overloaded" if isinstance(error, Overloaded) else "transfer_failed")
        assert h.is_clean()


@in_virtual_time
async def test_a_refusal_after_the_commit_tells_the_gateway_once_and_frees_the_blocks() -> None:
    with house() as h:
        await h.start()
        h.turn(TokenOutput(KEY, 0, (42,)), Progress(KEY, 10, BLOCKS, done=True))
        h.peers.refuse(Overloaded("full"))
        first, told = await h.told()
        assert first.token_ids == (42,)
        assert is_error(told, "overloaded")
        assert h.sent[1:] == [Release(KEY)]
        assert h.is_clean()


@in_virtual_time
async def test_a_prompt_whose_deadline_passes_in_the_queue_is_never_started() -> None:
    with house() as h:
        h.turn(stats=EngineStats(num_blocks=NUM_BLOCKS, num_held_blocks=NUM_BLOCKS))  # nothing may start now
        h.submit(timeout_s=3.0)
        await asyncio.sleep(4)
        h.turn()
        (told,) = await h.told()
        assert is_error(told, "deadline_exceeded")
        assert h.sent == []


@in_virtual_time
async def test_a_decode_worker_that_never_answers_is_a_refusal() -> None:
    with house() as h:
        await h.start()
        await asyncio.sleep(10)
        (told,) = await h.told()
        assert is_error(told, "transfer_failed")
        assert h.sent[1:] == [Abort(KEY)]
        assert h.is_clean()


@in_virtual_time
async def test_a_refusal_that_crosses_the_last_token_tells_only_of_the_end() -> None:
    with house() as h:
        await h.start()
        h.turn(TokenOutput(KEY, 0, (2,), FinishReason.STOP))
        h.peers.refuse(Overloaded("full"))
        (told,) = await h.told()
        assert told.finish is FinishReason.STOP
        assert len(h.sent) == 1


@in_virtual_time
async def test_an_engine_that_refuses_the_request_is_heard_once() -> None:
    with house() as h:
        h.submit()
        h.turn(TokenOutput(KEY, 0, (), FinishReason.ERROR, ErrorInfo("invalid_request", "too long")))
        (told,) = await h.told()
        assert is_error(told, "invalid_request")
        assert h.is_clean()


# --- abort, in each state -------------------------------------------------------------------------------------


@in_virtual_time
async def test_an_abort_in_the_queue_never_reaches_the_engine() -> None:
    with house() as h:
        h.turn(stats=EngineStats(num_blocks=100, num_held_blocks=50))
        h.submit()
        h.side.abort(KEY)
        h.turn()
        assert h.sent == []
        assert h.is_clean()


@in_virtual_time
async def test_an_abort_before_the_first_chunk_ends_it_in_the_engine() -> None:
    with house() as h:
        h.submit()
        h.side.abort(KEY)
        h.turn(Progress(KEY, 0, BLOCKS))  # it was under way
        h.turn(TokenOutput(KEY, 0, (), FinishReason.ABORT))
        await settle()
        assert h.sent[1:] == [Abort(KEY)]
        assert h.peers.offers == []
        assert h.is_clean()


@in_virtual_time
async def test_an_abort_during_the_offer_cancels_the_offer() -> None:
    with house() as h:
        await h.start()
        h.side.abort(KEY)
        await settle()
        assert h.peers.num_cancelled == 1
        assert h.sent[1:] == [Abort(KEY)]
        assert h.is_clean()


@in_virtual_time
async def test_an_abort_after_the_commit_ends_the_lease_for_its_reader() -> None:
    with house() as h:
        await h.to_commit()
        stream = h.outbox.messages(h.lease, 0)
        await anext(stream)
        h.side.abort(KEY)
        with pytest.raises(LeaseLost):
            await anext(stream)
        assert h.sent[1:] == [Release(KEY)]
        assert h.is_clean()


@in_virtual_time
async def test_an_abort_of_an_unknown_key_or_a_second_one_is_no_error_and_left_to_others() -> None:
    with house() as h:
        assert not h.side.abort(Key("never", 0))
        await h.to_commit()
        assert h.side.abort(KEY)
        assert not h.side.abort(KEY)
        assert [type(command) for command in h.sent] == [Add, Release]
        assert h.is_clean()


@in_virtual_time
async def test_an_abort_of_an_older_epoch_leaves_the_newer_alone() -> None:
    with house() as h:
        h.submit(epoch=1)
        h.side.abort(KEY)
        assert h.streams.num_keys == 1
        h.turn(Progress(Key("r", 1), 0, BLOCKS))
        await settle()
        assert h.lease.key == Key("r", 1)


# --- the lease ends -------------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_lease_that_expires_before_the_commit_ends_the_request_and_tells_the_gateway_once() -> None:
    with house() as h:
        await h.start()
        h.peers.accept()
        await asyncio.sleep(TTL_S)
        h.outbox.expire()
        assert h.sent[1:] == [Abort(KEY)]
        h.turn(TokenOutput(KEY, 0, (), FinishReason.ABORT))
        (told,) = await h.told()
        assert is_error(told, "lease_lost")
        assert h.is_clean()


@in_virtual_time
async def test_a_lease_that_expires_while_the_last_chunk_is_computed_tells_the_gateway_once() -> None:
    """The engine has handed off before the Abort reaches it, so it does not answer with an ABORT."""
    with house() as h:
        await h.start()
        h.peers.accept()
        await asyncio.sleep(TTL_S)
        h.outbox.expire()
        h.turn(TokenOutput(KEY, 0, (42,)), Progress(KEY, 10, BLOCKS, done=True))
        (told,) = await h.told()
        assert is_error(told, "lease_lost")
        assert h.sent[1:] == [Abort(KEY)]
        assert h.is_clean()


@in_virtual_time
async def test_a_lease_that_expires_after_the_commit_frees_the_blocks_in_silence() -> None:
    """Its owner may have adopted the sequence and only its release was lost; if not, it tells the gateway itself."""
    with house() as h:
        await h.to_commit()
        await asyncio.sleep(TTL_S)
        h.outbox.expire()
        assert h.sent[1:] == [Release(KEY)]
        (told,) = await h.told()
        assert told.token_ids == (42,)
        assert h.is_clean()


@in_virtual_time
async def test_a_lease_that_is_released_before_the_commit_ends_the_request() -> None:
    """Its owner's pull has failed."""
    with house() as h:
        await h.start()
        h.peers.accept()
        h.turn(Progress(KEY, 8, BLOCKS))
        h.outbox.release(h.lease)
        assert h.sent[1:] == [Abort(KEY)]
        assert h.is_clean()


@in_virtual_time
async def test_nothing_that_went_wrong_leaves_a_task_behind() -> None:
    with house() as h:
        await h.start()
        h.side.abort(KEY)
        await settle()
        h.submit("s")
        h.turn(Progress(Key("s", 0), 0, BLOCKS))
        await settle()
        h.peers.refuse(Overloaded("full"))
        await settle()
        assert asyncio.all_tasks() == {asyncio.current_task()}


# --- several answers to one prompt ----------------------------------------------------------------------------


SIBLING = Key("r.1", 0)


async def two_answers(h: House) -> None:
    """Submitted as one, and the first chunk scheduled."""
    request = Request("r", tuple(range(10)), SamplingParams(max_tokens=8))
    h.side.submit(Submission(request, GATEWAY, DECODE, (request.sibling(SIBLING, 1),)))
    h.turn(Progress(KEY, 0, BLOCKS))
    await settle()
    h.peers.accept()


def both_firsts() -> tuple[TokenOutput | Progress, ...]:
    return TokenOutput(KEY, 0, (42,)), TokenOutput(SIBLING, 0, (43,)), Progress(KEY, 10, BLOCKS, done=True)


async def handed(h: House) -> HandOff:
    messages = [message async for message in h.outbox.messages(h.lease, 0)]
    assert isinstance(messages[-1], Commit)
    return HandOff.decode(messages[-1].handoff)


@in_virtual_time
async def test_several_answers_are_one_offer_and_one_hand_off() -> None:
    with house() as h:
        await two_answers(h)
        assert h.peers.offers[0].keys == (KEY, SIBLING)
        h.turn(*both_firsts())
        handoff = await handed(h)
        assert (handoff.request.generated_ids, handoff.request.key) == ((42,), KEY)
        (sibling,) = handoff.siblings
        assert (sibling.generated_ids, sibling.key, sibling.sampling.choice) == ((43,), SIBLING, 1)
        h.outbox.release(h.lease)
        await h.told()
        assert h.is_clean() and h.sent[1:] == [Release(KEY)]


@in_virtual_time
@pytest.mark.parametrize("gone", [KEY, SIBLING], ids=["the one that names the blocks", "the other"])
async def test_an_answer_that_is_ended_leaves_the_other_its_blocks(gone: Key) -> None:
    """The blocks are held under the first one's key: an Abort of it would free them under the reader."""
    with house() as h:
        await two_answers(h)
        h.side.abort(gone)
        assert h.sent[1:] == ([] if gone == KEY else [Abort(SIBLING)])
        assert h.side.abort(gone) == (gone == KEY), "and again: it is still this side's, as it names the blocks"
        h.turn(*both_firsts())
        handoff = await handed(h)
        assert handoff.request.key == (SIBLING if gone == KEY else KEY) and not handoff.siblings
        h.outbox.release(h.lease)
        await h.told()
        assert h.is_clean() and h.sent[-1] == Release(KEY)


@in_virtual_time
async def test_the_last_answer_that_is_ended_ends_the_submission() -> None:
    with house() as h:
        await two_answers(h)
        h.side.abort(KEY)
        h.side.abort(SIBLING)
        assert h.sent[1:] == [Abort(KEY), Abort(SIBLING)] and h.is_clean()


@in_virtual_time
async def test_one_answer_leaves_the_queue_and_the_others_stay() -> None:
    with house() as h:
        for index in range(BACKLOG):
            h.submit(f"before{index}")
        request = Request("r", tuple(range(10)), SamplingParams(max_tokens=8))
        h.side.submit(Submission(request, GATEWAY, DECODE, (request.sibling(SIBLING, 1),)))
        h.side.abort(KEY)
        h.turn(TokenOutput(Key("before0", 0), 0, (42,)))
        assert h.sent[-1] == Add(request.sibling(SIBLING, 1), handoff=True)


@in_virtual_time
async def test_a_refusal_reaches_every_answer() -> None:
    with house() as h:
        request = Request("r", tuple(range(10)), SamplingParams(max_tokens=8))
        h.side.submit(Submission(request, GATEWAY, DECODE, (request.sibling(SIBLING, 1),)))
        h.turn(Progress(KEY, 0, BLOCKS))
        await settle()
        h.peers.refuse(Overloaded("full"))
        told = await h.told()
        assert [one.key for one in told] == [KEY, SIBLING] and all(is_error(one, "overloaded") for one in told)
        assert h.is_clean()


# --- prefixes that another worker has -----------------------------------------------------------------------------


async def fetching(h: House, stats: EngineStats = STATS) -> None:
    """A submission whose prompt another worker has the beginning of."""
    h.side.on_outputs(StepOutputs(stats=stats, steps=(PACE,)))
    h.submit(source=DECODE)
    await settle()


@in_virtual_time
async def test_a_prompt_waits_for_the_prefix_that_is_fetched() -> None:
    with house() as h:
        await fetching(h)
        assert h.prefixes.begun == [("r", DECODE, pytest.approx(0.1))], "for no longer than to compute it"
        assert h.sent == []
        h.prefixes.ends[0].set_result(None)
        await settle()
        (added,) = h.sent
        assert isinstance(added, Add)
        assert added.handoff


@in_virtual_time
async def test_what_a_worker_cannot_judge_is_not_fetched() -> None:
    with house() as h:
        h.submit(source=DECODE)
        await settle()
        assert h.prefixes.begun == [], "it has computed nothing yet"
        assert [type(one) for one in h.sent] == [Add]


@in_virtual_time
async def test_a_link_must_beat_computing() -> None:
    with house() as h:
        await fetching(h)
        (worth,) = h.prefixes.worth
        assert worth(100, None), "a link that was never measured is tried"
        assert worth(100, 1e6)
        assert not worth(100, 1e5), "100 KB take as long as 100 tokens"
        assert not worth(0, None)


@pytest.mark.parametrize("queued", [True, False])
@in_virtual_time
async def test_an_abort_ends_a_fetch(queued: bool) -> None:
    with house() as h:
        await fetching(h, replace(STATS, num_held_blocks=STATS.num_blocks) if queued else STATS)
        h.side.abort(KEY)
        await settle()
        assert h.prefixes.ends[0].cancelled()
        assert not [one for one in h.sent if isinstance(one, Add)]
