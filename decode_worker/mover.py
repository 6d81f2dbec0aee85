"""The mover: takes a running sequence from this decode worker to another one, while its stream goes on.

1. `back_up` copies the full blocks to the target's prefix cache while the sequence decodes, again for what is full by
   then, until little is left;
2. the sequence stands still, and is offered to the target under its new key: what is there already is found by its
   names, so only the tail moves;
3. the target says that it has adopted it: it is forgotten here. Anything else, and it goes on here as if nothing had
   been: the gateway takes tokens of either key, each index once, so not even an answer that is lost does harm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from engine.errors import TransferFailed
from engine.questions import Questions
from engine.streams import TokenStreams
from engine.types import Command, Endpoint, Freeze, Frozen, Key, Release, Resume
from kv_transfer.handoff import HandOff
from kv_transfer.lease import Loan, Offer, check_cohort
from kv_transfer.lender import Lender, Outgoing

MAX_ROUNDS = 4  # of copying what was generated during the one before
LITTLE = 1  # full blocks that may be left for the tail
LONGEST_PAUSE_S = 2.0  # then the sequence goes on here


class MovePeers(Protocol):
    """Reaches other decode workers. Errors are SteelyardError."""

    async def offer(self, target: Endpoint, offer: Offer, timeout_s: float) -> None:
        """Of a moving sequence: returns when `target` has adopted it."""
        ...

    async def copy(self, target: Endpoint, loan: Loan, timeout_s: float) -> None:
        """Returns when `target` has the loan in its cache."""
        ...


class Mover:
    def __init__(
        self, me: Endpoint, lender: Lender, outgoing: Outgoing, questions: Questions, streams: TokenStreams,
        peers: MovePeers, send: Callable[[Command], None],
    ) -> None:  # fmt: skip
        self._me = me
        self._lender = lender
        self._outgoing = outgoing
        self._questions = questions
        self._streams = streams
        self._peers = peers
        self._send = send
        self._moves: dict[Key, Key] = {}  # under way: the new key of each
        self._aborted: set[Key] = set()  # of these, those that ended meanwhile

    async def back_up(self, key: Key, target: Endpoint, timeout_s: float) -> None:
        """Copy the full blocks of a sequence to the target's cache. Raises TransferFailed, Overloaded."""
        check_cohort(target.worker_id, target.cohort, self._me.cohort)
        num_known = 0
        for _ in range(MAX_ROUNDS):
            loan = await self._lender.lend(of=key)
            if loan is None:
                return
            if len(loan.names) <= num_known + LITTLE:
                self._lender.take_back(loan)
                return
            try:
                await self._peers.copy(target, loan, timeout_s)
            except BaseException:
                self._lender.take_back(loan)
                raise
            num_known = len(loan.names)

    async def move(self, key: Key, target: Endpoint, to: Key, timeout_s: float) -> None:
        """Returns when the sequence runs at the target under the key `to`. After a TransferFailed or Overloaded it runs
        on here, unless it has ended. `timeout_s`: what is left until its deadline."""
        gateway_id = self._streams.owner(key)
        if gateway_id is None:
            raise TransferFailed(f"{key} does not run here")
        if key in self._moves:
            raise TransferFailed(f"{key} is moving already")
        self._moves[key] = to
        try:
            await self.back_up(key, target, timeout_s)
            frozen = await self._questions.freeze(Freeze(key))
            if frozen.request is None:
                raise TransferFailed(f"{key} cannot move: {frozen.reason}")
            if key in self._aborted:  # the abort follows the answer: its blocks are, or will soon be, others'
                raise TransferFailed(f"{key} has ended")
            await self._move_tail(frozen, target, to, gateway_id, timeout_s)
        finally:
            del self._moves[key]
            self._aborted.discard(key)

    def abort(self, key: Key) -> None:
        """The sequence ends, wherever its move is: nobody may read blocks that others write to."""
        to = self._moves.get(key)
        if to is not None:
            self._aborted.add(key)
            self._outgoing.close(to)

    async def _move_tail(
        self, frozen: Frozen, target: Endpoint, to: Key, gateway_id: str, timeout_s: float
    ) -> None:  # fmt: skip
        assert frozen.request is not None
        request = replace(frozen.request, epoch=to.epoch, timeout_s=timeout_s)
        handoff = HandOff(request, frozen.computed, frozen.cached_tokens, gateway_id)
        growth = request.sampling.max_tokens - len(request.generated_ids)
        try:
            lease = self._outgoing.grant(to, self._me)
            self._outgoing.commit(to, frozen.block_ids, handoff.encode())
            offer = Offer(lease, frozen.computed, growth, gateway_id, timeout_s, names=frozen.names, moving=True)
            await self._peers.offer(target, offer, min(LONGEST_PAUSE_S, timeout_s))
        except BaseException:
            self._outgoing.close(to)
            self._send(Resume(frozen.key))
            raise
        self._outgoing.close(to)
        self._streams.forget(frozen.key)
        self._send(Release(frozen.key))
