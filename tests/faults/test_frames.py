"""Frames and places that come hurt from a real producer's server, and leases that are not what they were.

By each carrier: what happens once costs a resume and the right bytes come; what always happens is a typed error.
Nothing is written beside the reservation, and the producer goes on: its lease stays, and a right pull is served.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import pytest

from engine.errors import LeaseLost, TransferFailed
from engine.runs import Runs
from engine.types import Key
from kv_transfer.config import TransferConfig
from kv_transfer.frames import Commit, Frame, Place
from kv_transfer.lease import Lease
from kv_transfer.pull import MAX_RESUMES
from tests.kv_transfer.fakes import KEY, PRODUCER, TTL_S, Transfer, handoff_of, transfer
from tests.kv_transfer.test_shm_carrier import committed, serve
from tests.virtual import until

NUM_TOKENS = 23  # six blocks
HURT = 3  # the number of the frame that it happens to

Sent = Frame | Place | Commit
Change = Callable[[Sequence[Sent]], Iterable[Sent]]


def earlier(sent: Sequence[Sent]) -> list[Sent]:
    return [one for one in sent if not isinstance(one, Commit) and one.index < HURT]


def hurt(change: Callable[[Frame | Place], Sequence[Sent]]) -> Change:
    """Of all messages the one of frame HURT."""
    return lambda sent: [
        part for one in sent for part in (change(one) if not isinstance(one, Commit) and one.index == HURT else [one])
    ]


def swapped(sent: Sequence[Sent]) -> list[Sent]:
    at = len(earlier(sent))
    return [*sent[:at], sent[at + 1], sent[at], *sent[at + 2 :]]


CHANGES: dict[str, Change] = {
    "doubled": hurt(lambda one: [one, one]),
    "lost": hurt(lambda one: []),
    "of another number": hurt(lambda one: [replace(one, index=HURT + 1)]),
    "of an earlier number": hurt(lambda one: [replace(one, index=0)]),
    "of a wrong digest": hurt(lambda one: [replace(one, digest=one.digest ^ 1)]),
    "for other blocks": hurt(lambda one: [replace(one, spec=replace(one.spec, blocks=range(0, 1)))]),
    "beyond the reservation": hurt(lambda one: [replace(one, spec=replace(one.spec, blocks=range(90, 91)))]),
    "of an unknown plane": hurt(lambda one: [replace(one, spec=replace(one.spec, plane=9))]),
    "in another order": swapped,
    "ended early": earlier,
    "committed early": lambda sent: [*earlier(sent), sent[-1]],
}


@dataclass(eq=False)
class Hurting:
    """Implements kv_transfer.carrier.Producer: another one's messages, changed in the first `times` pulls."""

    case: Transfer
    change: Change
    times: int
    num_pulls: int = 0

    async def messages(self, lease: Lease, first_frame: int, present: Runs = ()) -> AsyncGenerator[Frame | Commit]:
        sent = [one async for one in self.case.outbox.messages(lease, first_frame, present)]
        for one in self._changed(sent):
            assert not isinstance(one, Place)
            yield one

    async def places(
        self, lease: Lease, first_frame: int, present: Runs = ()
    ) -> AsyncGenerator[tuple[Place, ...] | Commit]:
        sent: list[Sent] = []
        async for message in self.case.outbox.places(lease, first_frame, present):
            sent += message if isinstance(message, tuple) else (message,)
        for one in self._changed(sent):
            assert not isinstance(one, Frame)
            yield one if isinstance(one, Commit) else (one,)

    def release(self, lease: Lease) -> None:
        self.case.outbox.release(lease)

    def renew(self, leases: Sequence[Lease]) -> None:
        self.case.outbox.renew(leases)

    def _changed(self, sent: Sequence[Sent]) -> Iterable[Sent]:
        self.num_pulls += 1
        return self.change(sent) if self.num_pulls <= self.times else sent


each_carrier = pytest.mark.parametrize("carrier", ["grpc", "shm"])


def only(carrier: str) -> TransferConfig:
    return TransferConfig.model_validate({"carrier": carrier})


@pytest.fixture
async def case() -> AsyncIterator[Transfer]:
    with transfer(NUM_TOKENS, producer=replace(PRODUCER, incarnation=secrets.token_hex(8))) as made:
        yield made


@each_carrier
@pytest.mark.parametrize("kind", CHANGES)
async def test_what_happens_to_a_frame_once_costs_a_resume(case: Transfer, kind: str, carrier: str) -> None:
    producer = Hurting(committed(case), CHANGES[kind], times=1)
    async with serve(case, only(carrier), producer) as served:
        pulled = await served.pull()
        assert (pulled.num_resumes, pulled.carrier) == (1, carrier)
        assert all(case.arrived())
        assert case.others_untouched()


@each_carrier
@pytest.mark.parametrize("kind", [kind for kind in CHANGES if kind != "doubled"])  # which brings what was due
async def test_what_always_happens_to_a_frame_fails_the_transfer_and_the_producer_goes_on(
    case: Transfer, kind: str, carrier: str
) -> None:
    producer = Hurting(committed(case), CHANGES[kind], times=MAX_RESUMES + 1)
    async with serve(case, only(carrier), producer) as served:
        with pytest.raises(TransferFailed):
            await served.pull()
        assert producer.num_pulls == MAX_RESUMES + 1
        assert case.others_untouched()
        assert case.outbox.num_leases == 1
        assert (await served.pull()).num_resumes == 0
        assert all(case.arrived())


@each_carrier
async def test_the_commit_of_an_earlier_epoch_is_refused(case: Transfer, carrier: str) -> None:
    """Whole, and with the right digests: only it is not for this request."""
    case.commit(handoff_of(NUM_TOKENS, Key(KEY.request_id, KEY.epoch + 1)))
    async with serve(case, only(carrier)) as served:
        with pytest.raises(TransferFailed, match="COMMIT is for"):
            await served.pull()
        assert case.others_untouched()


# --- leases ----------------------------------------------------------------------------------------------------

WRONG_LEASES: dict[str, Callable[[Lease], Lease]] = {
    "secret": lambda lease: replace(lease, secret=lease.secret + "x"),
    "no secret": lambda lease: replace(lease, secret=""),
    "epoch": lambda lease: replace(lease, key=Key(lease.key.request_id, lease.key.epoch + 1)),
    "request": lambda lease: replace(lease, key=Key("another", lease.key.epoch)),
    "cohort": lambda lease: replace(lease, cohort="another"),
    "incarnation": lambda lease: replace(lease, incarnation="an earlier life"),
}


@each_carrier
@pytest.mark.parametrize("kind", WRONG_LEASES)
async def test_a_wrong_lease_gets_nothing_prolongs_nothing_and_ends_nothing(
    case: Transfer, kind: str, carrier: str
) -> None:
    async with serve(committed(case), only(carrier)) as served:
        right = served.lease
        served.lease = WRONG_LEASES[kind](right)
        expires_at = case.outbox._entries[KEY].expires_at
        with pytest.raises(LeaseLost):
            await served.pull()
        wrong = served.carriers.carrier(served.lease)
        for call in (wrong.renew([served.lease]), wrong.release(served.lease)):
            if kind == "incarnation":
                with pytest.raises(LeaseLost):
                    await call
            else:
                await call
        assert not any(case.arrived()) and case.others_untouched()
        assert case.outbox.num_leases == 1 and case.outbox._entries[KEY].expires_at == expires_at
        served.lease = right
        assert (await served.pull()).num_resumes == 0


@each_carrier
async def test_a_lease_that_ends_in_the_midst_ends_its_pull_and_later_ones(case: Transfer, carrier: str) -> None:
    case.compute(12)
    async with serve(case, only(carrier)) as served:
        pull = asyncio.ensure_future(served.pull())
        await until(lambda: case.arrived()[0])
        case.outbox._entries[KEY].expires_at -= TTL_S
        assert case.outbox.expire() == [KEY]
        for late in (pull, served.pull()):
            with pytest.raises(LeaseLost):
                await late
        assert case.others_untouched()
        assert case.ended == [KEY]
