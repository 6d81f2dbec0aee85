from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest

from decode_worker.config import DecodeConfig
from decode_worker.intake import LOST_LEASE_GRACE_S, Intake
from engine.errors import FrameCorrupt, LeaseLost, Overloaded, TransferFailed
from engine.questions import ANSWER_TIMEOUT_S
from engine.runs import Runs
from engine.streams import TokenStreams
from engine.types import (
    Abort,
    Adopt,
    Command,
    Endpoint,
    EngineStats,
    ErrorInfo,
    FinishReason,
    Key,
    KvPath,
    KvTransfer,
    Release,
    Reserve,
    Reserved,
    StepOutputs,
    TokenOutput,
)
from kv_transfer.carrier import Carrier
from kv_transfer.config import TransferConfig
from kv_transfer.frames import Message
from kv_transfer.lease import Lease, Offer
from kv_transfer.pull import FIRST_PAUSE_S, MAX_RESUMES
from tests.kv_transfer.fakes import (
    KEY,
    LAYOUT,
    PRODUCER,
    Fault,
    Transfer,
    cut,
    deliver,
    flip,
    handoff_of,
    once,
    transfer,
)
from tests.virtual import in_virtual_time, settle

GATEWAY = "g0"
ME = Endpoint("d0", "j1", "127.0.0.1:2", PRODUCER.cohort)
TRANSFER = TransferConfig(pull_timeout_s=5.0)
NUM_TOKENS = 15
RESUMES_S = 8 * FIRST_PAUSE_S  # more than the pauses before all resumes


@dataclass(eq=False)
class Carriers:
    """One carrier per producer. Implements CarrierPool."""

    by_address: dict[str, Carrier] = field(default_factory=dict)
    num_fallbacks: dict[str, int] = field(default_factory=dict)

    def carrier(self, lease: Lease) -> Carrier:
        return self.by_address[lease.address]

    def paths(self) -> tuple[KvPath, ...]:
        return ()


@dataclass(eq=False)
class Deaf:
    """A producer that never answers."""

    num_asked: int = 0
    name: str = "deaf"

    async def pull(self, lease: Lease, first_frame: int, present: Runs = ()) -> AsyncGenerator[Message]:
        self.num_asked += 1
        await asyncio.Event().wait()
        yield b""  # type: ignore[misc]

    async def release(self, lease: Lease) -> None:
        await asyncio.Event().wait()

    async def renew(self, leases: Sequence[Lease]) -> None:
        self.num_asked += 1
        await asyncio.Event().wait()


@dataclass(eq=False)
class House:
    """An intake between a fake engine (a list of commands), a transfer, and a reader of its stream."""

    case: Transfer
    max_pulls: int = 8
    sent: list[Command] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.streams = TokenStreams(1e6, lambda key: None)
        self.carriers = Carriers({PRODUCER.address: self.case.link})
        self.intake = Intake(
            ME, LAYOUT, self.case.target, self.carriers, self.streams, self.sent.append,
            DecodeConfig(max_pulls=self.max_pulls), TRANSFER,
        )  # fmt: skip

    def offer(self, **lease: object) -> Offer:
        return Offer(replace(self.case.lease, **lease), NUM_TOKENS, 8, GATEWAY, 60.0)

    def turn(self, *tokens: TokenOutput, reserved: Sequence[Reserved] = ()) -> tuple[TokenOutput, ...]:
        """One turn of the engine, as the worker distributes it."""
        outputs = self.intake.on_outputs(StepOutputs(tokens, reserved=tuple(reserved)))
        self.streams.publish(outputs, EngineStats())
        return outputs

    async def begin(self) -> None:
        """Reserved, and the pull has begun."""
        reserve = asyncio.ensure_future(self.intake.reserve(self.offer()))
        await settle()
        self.turn(reserved=[Reserved(KEY, self.case.target_ids)])
        await reserve

    async def adopted(self) -> None:
        self.case.commit()
        await self.begin()
        await settle(200)

    async def told(self) -> list[TokenOutput]:
        await settle()
        stream = self.streams.subscribe(GATEWAY)
        await anext(stream)
        outputs = (await anext(stream)).outputs
        await stream.aclose()
        return list(outputs)

    def is_clean(self) -> bool:
        intake = self.intake
        return (self.streams.num_keys, len(intake._arrivals), len(intake.questions._reserving)) == (0, 0, 0)


@contextmanager
def house(fault: Fault = deliver, max_pulls: int = 8) -> Iterator[House]:
    with transfer(NUM_TOKENS, fault=fault) as case:
        yield House(case, max_pulls)


def is_error(output: TokenOutput, code: str) -> bool:
    return output.finish is FinishReason.ERROR and output.error is not None and output.error.code == code


# --- reserve --------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_an_offer_is_reserved_pulled_adopted_and_released() -> None:
    with house() as h:
        await h.begin()
        assert h.sent == [Reserve(KEY, NUM_TOKENS, 8)]
        assert h.intake.num_pulls == 1
        h.case.commit()
        await settle(200)
        adopt = h.sent[-1]
        assert isinstance(adopt, Adopt)
        assert (adopt.request.key, adopt.request.generated_ids, adopt.computed) == (KEY, (7,), NUM_TOKENS)
        assert len(h.sent) == 2
        assert all(h.case.arrived())
        assert h.case.others_untouched()
        assert h.case.link.released == [h.case.lease]
        assert h.intake.num_pulls == 0
        (output,) = h.turn(TokenOutput(KEY, 1, (8,)))
        assert [name for name, _ in output.stages] == ["transfer", "decode_wait", "steps"]
        assert output.transfer is not None
        assert output.transfer.size_bytes == len(h.case.target_ids) * LAYOUT.bytes_per_block
        (second,) = h.turn(TokenOutput(KEY, 2, (9,), FinishReason.LENGTH))
        assert (second.stages, second.transfer) == ((), None)
        assert h.is_clean()


@in_virtual_time
async def test_the_prompt_tokens_that_prefill_found_cached_are_carried_on() -> None:
    with house() as h:
        h.case.commit(replace(handoff_of(NUM_TOKENS), cached_tokens=4))
        await h.begin()
        await settle(200)
        adopt = h.sent[-1]
        assert isinstance(adopt, Adopt)
        assert adopt.cached_tokens == 4


@in_virtual_time
async def test_an_engine_without_room_is_a_refusal_with_its_reason() -> None:
    with house() as h:
        reserve = asyncio.ensure_future(h.intake.reserve(h.offer()))
        await settle()
        h.turn(reserved=[Reserved(KEY, None, "4+2 blocks wanted, 1 available")])
        with pytest.raises(Overloaded, match="4\\+2 blocks wanted"):
            await reserve
        assert h.sent[1:] == [Release(KEY)]
        assert h.case.link.pulls == []
        assert h.is_clean()


@in_virtual_time
async def test_an_engine_that_answers_too_late_has_its_blocks_given_back() -> None:
    with house() as h:
        with pytest.raises(Overloaded, match="in time"):
            await h.intake.reserve(h.offer())
        assert asyncio.get_running_loop().time() == pytest.approx(ANSWER_TIMEOUT_S)
        assert h.sent[1:] == [Release(KEY)]
        h.turn(reserved=[Reserved(KEY, h.case.target_ids)])
        assert h.sent[2:] == [Release(KEY)]
        assert h.is_clean()


@in_virtual_time
async def test_a_producer_that_hangs_up_before_the_answer_leaves_nothing_reserved() -> None:
    with house() as h:
        reserve = asyncio.ensure_future(h.intake.reserve(h.offer()))
        await settle()
        reserve.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reserve
        assert h.sent[1:] == [Release(KEY)]
        h.turn(reserved=[Reserved(KEY, h.case.target_ids)])
        assert h.sent[2:] == [Release(KEY)]
        assert h.is_clean()


@in_virtual_time
async def test_a_producer_of_another_cohort_is_refused_before_anything_is_asked() -> None:
    with house() as h:
        with pytest.raises(TransferFailed, match=r"p0 is of another cohort: they differ in model, cohort$"):
            await h.intake.reserve(h.offer(cohort="model=2"))
        assert h.sent == []
        assert h.is_clean()


@in_virtual_time
async def test_more_pulls_than_allowed_are_refused_until_one_has_ended() -> None:
    with house(max_pulls=2) as h:
        await h.begin()
        other = asyncio.ensure_future(h.intake.reserve(h.offer(key=Key("other", 0))))
        await settle()
        with pytest.raises(Overloaded, match="2 pulls"):
            await h.intake.reserve(h.offer(key=Key("third", 0)))
        h.turn(reserved=[Reserved(Key("other", 0), None, "full")])
        with pytest.raises(Overloaded, match="full"):
            await other
        third = asyncio.ensure_future(h.intake.reserve(h.offer(key=Key("third", 0))))
        await settle()
        h.turn(reserved=[Reserved(Key("third", 0), (0,))])
        await third


@in_virtual_time
async def test_the_same_offer_twice_is_refused_and_the_first_goes_on() -> None:
    with house() as h:
        await h.begin()
        with pytest.raises(TransferFailed, match="before"):
            await h.intake.reserve(h.offer())
        h.case.commit()
        await settle(200)
        assert [type(command) for command in h.sent] == [Reserve, Adopt]


# --- pulls that fail ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (lambda at, data: cut(data), "transfer_failed"),
        (lambda at, data: flip(-1)(data), "frame_corrupt"),
        (lambda at, data: [data[:9]], "frame_corrupt"),
    ],
    ids=["cut", "flipped", "truncated"],
)
@in_virtual_time
async def test_a_failed_pull_gives_the_blocks_back_tells_the_gateway_once_and_releases(fault: Fault, code: str) -> None:
    with house(fault) as h:
        await h.adopted()
        await asyncio.sleep(RESUMES_S)
        assert h.sent == [Reserve(KEY, NUM_TOKENS, 8), Release(KEY)]
        assert h.case.link.released == [h.case.lease]
        (told,) = await h.told()
        assert is_error(told, code)
        assert h.intake.totals.num_failed == 1
        assert h.is_clean()


@in_virtual_time
async def test_a_silent_producer_is_a_failed_pull() -> None:
    with house() as h:
        h.carriers.by_address[PRODUCER.address] = deaf = Deaf()
        await h.begin()
        await asyncio.sleep(TRANSFER.pull_timeout_s * (MAX_RESUMES + 1) + 1)
        assert deaf.num_asked == MAX_RESUMES + 1
        (told,) = await h.told()
        assert is_error(told, "transfer_failed")
        await asyncio.sleep(10)  # its release is not waited for longer than that
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert h.is_clean()


@in_virtual_time
async def test_a_lost_lease_gives_the_blocks_back_at_once_and_leaves_it_to_the_producer_to_tell_why() -> None:
    with house() as h:
        await h.begin()
        h.case.outbox.close(KEY)
        await settle()
        assert h.sent[1:] == [Release(KEY)]
        await asyncio.sleep(0.9 * LOST_LEASE_GRACE_S)
        assert h.streams.num_keys == 1
        h.streams.publish((), EngineStats())
        await asyncio.sleep(0.2 * LOST_LEASE_GRACE_S)
        (told,) = await h.told()
        assert is_error(told, "lease_lost")
        assert h.is_clean()


@in_virtual_time
async def test_a_lost_lease_of_an_aborted_request_tells_nobody() -> None:
    with house() as h:
        await h.begin()
        h.case.outbox.close(KEY)
        await settle()
        await h.intake.abort(KEY)
        await asyncio.sleep(2 * LOST_LEASE_GRACE_S)
        assert await h.told() == []
        assert h.is_clean()


@in_virtual_time
async def test_a_fault_of_the_carrier_itself_fails_the_request_and_keeps_no_block(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with house() as h:
        h.carriers.by_address.clear()  # asking for the carrier raises KeyError
        reserve = asyncio.ensure_future(h.intake.reserve(h.offer()))
        await settle()
        h.turn(reserved=[Reserved(KEY, h.case.target_ids)])
        await reserve
        h.carriers.by_address[PRODUCER.address] = h.case.link
        await settle()
        assert h.sent[1:] == [Release(KEY)]
        (told,) = await h.told()
        assert is_error(told, "transfer_failed")
        assert h.is_clean()


@in_virtual_time
async def test_an_adoption_that_the_engine_refuses_is_heard_by_the_gateway() -> None:
    with house() as h:
        await h.adopted()
        h.turn(TokenOutput(KEY, 0, (), FinishReason.ERROR, ErrorInfo("invalid_request", "too long")))
        (told,) = await h.told()
        assert is_error(told, "invalid_request")
        assert h.is_clean()


# --- abort, in each state -------------------------------------------------------------------------------------


@in_virtual_time
async def test_an_abort_before_the_offer_does_nothing_and_the_offer_is_taken() -> None:
    """The gateway aborts both workers, so the lease of such an offer is ended by its producer."""
    with house() as h:
        await h.intake.abort(KEY)
        await h.begin()
        h.case.outbox.close(KEY)
        await asyncio.sleep(2 * LOST_LEASE_GRACE_S)
        assert h.sent == [Abort(KEY), Reserve(KEY, NUM_TOKENS, 8), Release(KEY)]
        assert h.is_clean()


@in_virtual_time
async def test_an_abort_between_reserve_and_its_answer_refuses_the_offer() -> None:
    with house() as h:
        reserve = asyncio.ensure_future(h.intake.reserve(h.offer()))
        await settle()
        await h.intake.abort(KEY)
        h.turn(reserved=[Reserved(KEY, h.case.target_ids)])
        with pytest.raises(Overloaded, match="aborted"):
            await reserve
        assert h.sent[1:] == [Abort(KEY), Release(KEY)]
        assert h.case.link.pulls == []
        assert h.is_clean()


@in_virtual_time
async def test_an_abort_at_the_moment_of_the_answer_starts_no_pull() -> None:
    with house() as h:
        h.case.commit()
        reserve = asyncio.ensure_future(h.intake.reserve(h.offer()))
        await settle()
        h.turn(reserved=[Reserved(KEY, h.case.target_ids)])
        await h.intake.abort(KEY)
        with pytest.raises(Overloaded):
            await reserve
        await settle()
        assert h.case.link.pulls == []
        assert h.is_clean()


@in_virtual_time
async def test_an_abort_before_the_pull_has_run_gives_the_blocks_back() -> None:
    with house() as h:
        h.case.commit()
        reserve = asyncio.ensure_future(h.intake.reserve(h.offer()))
        await settle()
        h.turn(reserved=[Reserved(KEY, h.case.target_ids)])
        await reserve  # the pull's task exists and has not begun
        await h.intake.abort(KEY)
        assert h.sent[1:][-1] == Abort(KEY)
        assert not any(isinstance(command, Adopt) for command in h.sent)
        assert h.is_clean()


@pytest.mark.parametrize("turns", range(0, 60, 5))
@in_virtual_time
async def test_whenever_the_abort_comes_nothing_is_written_after_the_blocks_are_given_back(turns: int) -> None:
    with house() as h:
        h.case.commit()
        await h.begin()
        await settle(turns)
        memory_at_end: list[bytes] = []

        def note(command: Command) -> None:
            if isinstance(command, Release | Abort) and not memory_at_end:
                memory_at_end.append(bytes(h.case.target.memory))

        h.intake._send = note
        await h.intake.abort(KEY)
        await settle(200)
        assert memory_at_end == [bytes(h.case.target.memory)]
        assert h.case.others_untouched()
        assert h.is_clean()
        assert asyncio.all_tasks() == {asyncio.current_task()}


@in_virtual_time
async def test_an_abort_of_a_decoding_request_goes_to_the_engine_and_nobody_is_told() -> None:
    with house() as h:
        await h.adopted()
        h.turn(TokenOutput(KEY, 1, (8,)))
        await h.intake.abort(KEY)
        h.turn(TokenOutput(KEY, 2, (), FinishReason.ABORT))
        assert h.sent[-1] == Abort(KEY)
        assert [output.token_ids for output in await h.told()] == [(8,)]
        assert h.is_clean()


# --- heartbeats and totals ------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_heartbeat_names_all_leases_of_a_producer_once_while_they_are_pulled() -> None:
    with house() as h:
        keys = [KEY, Key("s", 0)]
        for key in keys:
            reserve = asyncio.ensure_future(h.intake.reserve(h.offer(key=key)))
            await settle()
            await h.intake.beat()  # from the reservation on
            h.turn(reserved=[Reserved(key, h.case.target_ids)])
            await reserve
        assert [[lease.key for lease in leases] for leases in h.case.link.renewed] == [[KEY], keys]


@in_virtual_time
async def test_two_lives_of_a_producer_at_one_address_get_heartbeats_of_their_own() -> None:
    with house() as h:
        for incarnation in ("i1", "i2"):
            asyncio.ensure_future(h.intake.reserve(h.offer(key=Key(incarnation, 0), incarnation=incarnation)))  # noqa: RUF006
        await settle()
        await h.intake.beat()
        assert sorted(lease.incarnation for (lease,) in h.case.link.renewed) == ["i1", "i2"]


@in_virtual_time
async def test_a_producer_that_does_not_answer_delays_no_other_heartbeat() -> None:
    with house() as h:
        for index in range(3):
            h.carriers.by_address[f"deaf{index}"] = Deaf()
            asyncio.ensure_future(h.intake.reserve(h.offer(key=Key(f"k{index}", 0), address=f"deaf{index}")))  # noqa: RUF006
        asyncio.ensure_future(h.intake.reserve(h.offer()))  # noqa: RUF006
        await settle()
        begun = asyncio.get_running_loop().time()
        await h.intake.beat()
        assert asyncio.get_running_loop().time() - begun == pytest.approx(TRANSFER.heartbeat_s)
        assert len(h.case.link.renewed) == 1


@in_virtual_time
async def test_heartbeats_keep_a_lease_alive_while_prefill_takes_long() -> None:
    with house() as h:
        await h.begin()
        for _ in range(8):  # 16 s of heartbeats, and the lease lives 10 s
            h.case.compute(8)
            await asyncio.sleep(TRANSFER.heartbeat_s)
            await h.intake.beat()
            assert h.case.outbox.expire() == []
        h.case.commit()
        await settle(200)
        assert isinstance(h.sent[-1], Adopt)


@in_virtual_time
async def test_after_the_adoption_there_are_no_more_heartbeats() -> None:
    with house() as h:
        await h.adopted()
        await h.intake.beat()
        assert h.case.link.renewed == []


@in_virtual_time
async def test_totals_count_what_was_pulled() -> None:
    with house(once(3, cut)) as h:
        await h.begin()
        await asyncio.sleep(2)
        h.case.commit()
        await asyncio.sleep(RESUMES_S)
        totals = h.intake.totals
        assert (totals.num_pulls, totals.num_failed, totals.num_resumes) == (1, 0, 1)
        assert totals.size_bytes == len(h.case.target_ids) * LAYOUT.bytes_per_block
        assert totals.duration_s == pytest.approx(2.0 + FIRST_PAUSE_S, abs=0.06)


@in_virtual_time
async def test_what_came_while_the_prompt_was_computed_is_told_to_the_gateway_and_counted() -> None:
    with house() as h:
        await h.begin()
        h.case.compute(8)
        await asyncio.sleep(3)
        h.case.commit(replace(handoff_of(NUM_TOKENS), overlap_s=h.case.outbox.overlap_s(KEY)))
        await asyncio.sleep(1)
        (output,) = h.turn(TokenOutput(KEY, 1, (8,)))
        size_bytes, hidden_bytes = (count * LAYOUT.bytes_per_block for count in (len(h.case.target_ids), 2))
        assert output.transfer == KvTransfer("link", size_bytes, hidden_bytes, 3.0, 0.0)
        (carrier,) = h.streams.transfers.totals
        assert (carrier.size_bytes, carrier.hidden_bytes) == (size_bytes, hidden_bytes)


@in_virtual_time
async def test_what_the_engine_has_under_the_offers_names_does_not_move_and_is_counted() -> None:
    with house() as h:
        reserve = asyncio.ensure_future(h.intake.reserve(replace(h.offer(), names=(b"first", b"second"))))
        await settle()
        assert h.sent == [Reserve(KEY, NUM_TOKENS, 8, names=(b"first", b"second"))]
        h.turn(reserved=[Reserved(KEY, h.case.target_ids, present=(range(2),))])
        await reserve
        h.case.commit()
        await settle(200)
        assert isinstance(h.sent[-1], Adopt)
        size, num_blocks = LAYOUT.bytes_per_block, len(h.case.target_ids)
        totals, (carrier,) = h.intake.totals, h.streams.transfers.totals
        assert (totals.size_bytes, totals.saved_bytes) == ((num_blocks - 2) * size, 2 * size)
        assert (carrier.size_bytes, carrier.saved_bytes) == ((num_blocks - 2) * size, 2 * size)
        assert h.case.arrived() == [False] * 2 + [True] * (num_blocks - 2)


def test_the_errors_that_a_pull_may_end_with_are_kinds_of_transfer_failed() -> None:
    assert issubclass(LeaseLost, TransferFailed) and issubclass(FrameCorrupt, TransferFailed)


# --- several answers to one prompt ----------------------------------------------------------------------------

SIBLING = Key("r.1", 0)


async def two_begun(h: House) -> None:
    reserve = asyncio.ensure_future(h.intake.reserve(replace(h.offer(), siblings=(SIBLING,))))
    await settle()
    assert h.sent == [Reserve(KEY, NUM_TOKENS, 8, 2)]
    h.turn(reserved=[Reserved(KEY, h.case.target_ids)])
    await reserve


@in_virtual_time
@pytest.mark.parametrize("gone", [None, KEY, SIBLING], ids=["none", "the one that names the blocks", "the other"])
async def test_the_answers_that_are_still_wanted_are_adopted(gone: Key | None) -> None:
    with house() as h:
        await two_begun(h)
        if gone:
            await h.intake.abort(gone)
        first = handoff_of(NUM_TOKENS, KEY)
        siblings = (first.request.sibling(SIBLING, 1, first.request.generated_ids),)
        h.case.commit(replace(first, siblings=siblings))
        await settle(200)
        adopt = h.sent[-1]
        assert isinstance(adopt, Adopt) and adopt.reserved == KEY
        going = [request.key for request in (adopt.request, *adopt.siblings)]
        assert going == [key for key in (KEY, SIBLING) if key != gone]
        h.turn(*(TokenOutput(key, 1, (5,), FinishReason.LENGTH) for key in going))
        await h.told()
        assert h.is_clean()


@in_virtual_time
async def test_an_answer_that_is_ended_twice_leaves_the_other_its_blocks() -> None:
    with house() as h:
        await two_begun(h)
        await h.intake.abort(KEY)
        await h.intake.abort(KEY)
        assert h.intake.num_pulls == 1 and h.sent[1:] == []
        await h.intake.abort(SIBLING)
        assert h.is_clean()


@in_virtual_time
async def test_the_pull_ends_when_no_answer_is_wanted_any_more() -> None:
    with house() as h:
        await two_begun(h)
        await h.intake.abort(KEY)
        assert h.intake.num_pulls == 1
        await h.intake.abort(SIBLING)
        assert h.intake.num_pulls == 0 and h.is_clean()
        assert h.sent[1:] == [Release(KEY), Abort(KEY)]


@in_virtual_time
async def test_a_hand_off_without_anything_that_is_wanted_gives_its_blocks_back() -> None:
    """The first answer ended with its first token, and the other was ended by its client."""
    with house() as h:
        await two_begun(h)
        await h.intake.abort(SIBLING)
        first = handoff_of(NUM_TOKENS, KEY).request
        h.case.commit(replace(handoff_of(NUM_TOKENS, KEY), request=first.sibling(SIBLING, 1, first.generated_ids)))
        await settle(200)
        assert h.sent[-1] == Release(KEY) and h.is_clean()


@in_virtual_time
async def test_a_failed_pull_is_told_to_every_answer() -> None:
    with house() as h:
        await two_begun(h)
        h.case.outbox.close(KEY)
        await asyncio.sleep(5)
        told = await h.told()
        assert [one.key for one in told] == [KEY, SIBLING]
        assert h.is_clean()
