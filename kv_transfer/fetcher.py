"""The fetcher: brings the prefix of a prompt from the worker that has it, before the prompt is computed.

1. the prompt's full blocks are named, and the other worker lends the longest prefix of them that it has;
2. what is missing here is copied, if whoever asks finds that worth it; else the loan goes back.
Whatever fails, the prompt is computed: a prefix that did not come costs time, never an answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from engine.errors import SteelyardError
from engine.prefix import extend_hashes, root_hash
from engine.types import Endpoint, Request
from kv_transfer.carrier import CarrierPool
from kv_transfer.lease import Loan

BORROW_TIMEOUT_S = 1.0

IsWorth = Callable[[int, float | None], bool]  # (tokens that are missing, bytes per second of the link or None)
Take = Callable[[Loan, Callable[[int], bool]], Awaitable[None]]  # copy, if the number of missing blocks is worth it

log = logging.getLogger(__name__)


class Lenders(Protocol):
    async def borrow(self, source: Endpoint, names: tuple[bytes, ...], timeout_s: float) -> Loan | None:
        """The longest prefix of these names that `source` has; None if it has nothing of it."""
        ...


class Fetcher:
    """Implements prefill_worker.side.Prefixes."""

    def __init__(self, hash_key: bytes, block_size: int, lenders: Lenders, carriers: CarrierPool, take: Take) -> None:
        self._hash_key = hash_key
        self._block_size = block_size
        self._lenders = lenders
        self._carriers = carriers
        self._take = take

    async def fetch(self, request: Request, source: Endpoint, is_worth: IsWorth, timeout_s: float) -> None:
        names: list[bytes] = []
        tokens = (*request.prompt_ids, *request.generated_ids)
        extend_hashes(self._hash_key, names, root_hash(self._hash_key, request.namespace), tokens, self._block_size)
        try:
            async with asyncio.timeout(timeout_s):
                loan = await self._lenders.borrow(source, tuple(names), BORROW_TIMEOUT_S)
                if loan is not None:
                    rate = self._rate(source)
                    await self._take(loan, lambda num_blocks: is_worth(num_blocks * self._block_size, rate))
        except (SteelyardError, TimeoutError) as error:
            log.info("the prefix of %s did not come from %s: %r", request.request_id, source.worker_id, error)

    def _rate(self, source: Endpoint) -> float | None:
        """Of the fastest path that was measured."""
        rates = [path.bytes_per_s for path in self._carriers.paths() if path.peer == source.worker_id]
        return max(rates, default=None)
