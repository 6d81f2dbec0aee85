"""Loans: copied into the cache when they are whole and right, and given back whatever happens."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from engine.errors import FrameCorrupt, Overloaded, TransferFailed
from engine.questions import ANSWER_TIMEOUT_S, Questions
from engine.types import Command, Keep, Key, Lend, Lent, Release, Reserve, Reserved, StepOutputs
from kv_transfer.lease import Loan
from kv_transfer.lender import Lender
from tests.decode_worker.test_intake import ME, House, house
from tests.kv_transfer.fakes import KEY, LAYOUT, PRODUCER, flip
from tests.virtual import in_virtual_time, settle

NAMES = (b"a", b"b", b"c")
NUM_TOKENS = len(NAMES) * LAYOUT.block_size


def lent(h: House) -> Loan:
    """The first three blocks of the fake producer's request."""
    h.case.outbox.commit(KEY, h.case.source_ids[: len(NAMES)], b"")
    return Loan(h.case.lease, NAMES)


async def begun(h: House, loan: Loan, present: tuple[range, ...] = ()) -> asyncio.Future[None]:
    taking = asyncio.ensure_future(h.intake.take_loan(loan))
    await settle()
    h.turn(reserved=[Reserved(KEY, h.case.target_ids, present=present)])
    return taking


@in_virtual_time
async def test_a_loan_is_reserved_copied_kept_and_given_back() -> None:
    with house() as h:
        taking = await begun(h, lent(h), present=(range(0, 1),))
        await h.intake.beat()
        assert h.case.link.renewed == [(h.case.lease,)], "for as long as it takes"
        await taking
        assert h.sent == [Reserve(KEY, NUM_TOKENS, names=NAMES), Keep(KEY, NAMES)]
        assert h.case.arrived()[: len(NAMES)] == [False, True, True], "the first was here"
        assert h.case.link.released == [h.case.lease]
        assert h.intake.totals.num_pulls == 1
        assert h.intake.copies.leases == ()


@in_virtual_time
async def test_bytes_that_are_hurt_are_not_kept() -> None:
    with house(fault=lambda _, data: flip(-1)(data)) as h:
        taking = await begun(h, lent(h))
        with pytest.raises(FrameCorrupt):
            await taking
        assert h.sent[-1] == Release(KEY)
        assert h.case.link.released == [h.case.lease]


@in_virtual_time
async def test_without_room_or_in_another_cohort_nothing_is_copied() -> None:
    with house() as h:
        taking = asyncio.ensure_future(h.intake.take_loan(lent(h)))
        await settle()
        h.turn(reserved=[Reserved(KEY, None, "no blocks")])
        with pytest.raises(Overloaded, match="no blocks"):
            await taking
        with pytest.raises(TransferFailed, match="another cohort"):
            await h.intake.take_loan(Loan(replace(h.case.lease, cohort="other"), NAMES))
        assert h.case.link.pulls == []


@in_virtual_time
async def test_what_is_not_worth_it_goes_back() -> None:
    with house() as h:
        asked: list[int] = []

        def is_worth(num_missing: int) -> bool:
            asked.append(num_missing)
            return False

        taking = asyncio.ensure_future(h.intake.take_loan(lent(h), is_worth))
        await settle()
        h.turn(reserved=[Reserved(KEY, h.case.target_ids, present=(range(0, 2),))])
        await taking
        assert asked == [1]
        assert h.sent[-1] == Release(KEY)
        assert (h.case.link.pulls, h.case.link.released) == ([], [h.case.lease])


@in_virtual_time
async def test_a_copy_that_is_cancelled_gives_its_blocks_back() -> None:
    with house() as h:
        taking = asyncio.ensure_future(h.intake.take_loan(Loan(h.case.lease, NAMES)))  # never committed
        await settle()
        h.turn(reserved=[Reserved(KEY, h.case.target_ids)])
        await settle()
        taking.cancel()
        await settle()
        assert h.sent[-1] == Release(KEY)
        assert h.intake.copies.leases == ()


# --- lending ------------------------------------------------------------------------------------------------------


class Bank:
    def __init__(self, h: House) -> None:
        self.sent: list[Command] = []
        self.questions = Questions(self.sent.append)
        self.lender = Lender(ME, h.case.outbox, self.questions, self.sent.append)

    def answer(self, *names: bytes) -> None:
        asked = self.sent[-1]
        assert isinstance(asked, Lend)
        self.questions.on_outputs(StepOutputs(lent=(Lent(asked.key, names, tuple(range(len(names)))),)))


@in_virtual_time
async def test_what_is_lent_can_be_read_under_its_lease_until_it_is_taken_back() -> None:
    with house() as h:
        bank = Bank(h)
        lending = asyncio.ensure_future(bank.lender.lend(NAMES))
        await settle()
        bank.answer(*NAMES[:2])
        loan = await lending
        assert loan is not None
        assert (loan.names, loan.lease.worker_id) == (NAMES[:2], ME.worker_id)
        messages = [message async for message in h.case.outbox.messages(loan.lease, 0)]
        assert len(messages) > 1
        bank.lender.take_back(loan)
        assert bank.sent[-1] == Release(loan.lease.key)
        with pytest.raises(TransferFailed):
            await anext(h.case.outbox.messages(loan.lease, 0))


@in_virtual_time
async def test_nothing_is_lent_where_nothing_is_or_nobody_answers() -> None:
    with house() as h:
        bank = Bank(h)
        lending = asyncio.ensure_future(bank.lender.lend(NAMES))
        await settle()
        bank.answer()
        assert await lending is None
        late = asyncio.ensure_future(bank.lender.lend(of=Key("other", 0)))
        await asyncio.sleep(ANSWER_TIMEOUT_S + 1)
        with pytest.raises(Overloaded):
            await late
        bank.answer(*NAMES)
        assert isinstance(bank.sent[-1], Release), "what comes too late is held by nobody"
        assert PRODUCER.worker_id != ME.worker_id
