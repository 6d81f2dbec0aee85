"""The lender: what other workers may copy of this worker's cache, under leases like those of hand-offs.

A loan ends when its borrower gives it back, or is silent for too long; until then the engine holds its blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from engine.questions import Questions
from engine.types import Command, Endpoint, Key, Lend, Release
from kv_transfer.lease import Lease, Loan


class Outgoing(Protocol):
    """Where what leaves this worker lies (prefill_worker/outbox.py)."""

    def grant(self, key: Key, producer: Endpoint) -> Lease: ...

    def commit(self, key: Key, block_ids: tuple[int, ...], handoff: bytes) -> None: ...

    def close(self, key: Key) -> None: ...


class Lender:
    def __init__(
        self, me: Endpoint, outgoing: Outgoing, questions: Questions, send: Callable[[Command], None]
    ) -> None:  # fmt: skip
        self._me = me
        self._outgoing = outgoing
        self._questions = questions
        self._send = send
        self._num_loans = 0

    async def lend(self, names: tuple[bytes, ...] = (), of: Key | None = None) -> Loan | None:
        """The longest prefix that is here of these names, or of the sequence that runs under the key `of`; None if
        there is nothing. Raises Overloaded when the engine does not answer."""
        self._num_loans += 1
        key = Key(f"loan-{self._num_loans}-{self._me.incarnation}", 0)
        lent = await self._questions.lend(Lend(key, names, of))
        if not lent.names:
            return None
        lease = self._outgoing.grant(key, self._me)
        self._outgoing.commit(key, lent.block_ids, b"")
        return Loan(lease, lent.names)

    def take_back(self, loan: Loan) -> None:
        """Nobody wants it any more."""
        self._outgoing.close(loan.lease.key)
        self._send(Release(loan.lease.key))
