"""Copies: prefixes that other workers lend, brought into the prefix cache here.

1. the engine reserves blocks for the loan's names; those that it has are shared and need not move;
2. the others are pulled under the loan's lease;
3. verified, they are the cache's: whoever needs the prefix next finds it. A copy that fails leaves nothing behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from engine.block_table import transfer_entries
from engine.errors import Overloaded, TransferFailed
from engine.planes import CacheLayout
from engine.pool import BlockBytes
from engine.questions import Questions
from engine.types import Command, Keep, Key, Release, Reserve
from kv_transfer.carrier import CarrierPool, release
from kv_transfer.config import TransferConfig
from kv_transfer.lease import Lease, Loan, check_cohort
from kv_transfer.pull import Pulled, Puller


class Copies:
    def __init__(
        self, cohort: str, layout: CacheLayout, pool: BlockBytes, carriers: CarrierPool, questions: Questions,
        send: Callable[[Command], None], transfer: TransferConfig,
    ) -> None:  # fmt: skip
        self._cohort = cohort
        self._layout = layout
        self._pool = pool
        self._carriers = carriers
        self._questions = questions
        self._send = send
        self._transfer = transfer
        self._leases: dict[Key, Lease] = {}  # of the loans that are being copied

    @property
    def leases(self) -> tuple[Lease, ...]:
        return tuple(self._leases.values())

    async def take(
        self, loan: Loan, came: Callable[[Pulled], None], is_worth: Callable[[int], bool] = lambda _num_missing: True
    ) -> None:  # fmt: skip
        """Returns when all of it is cached here and the lender knows, or when the blocks that are missing here are not
        worth it. `came` hears of what is cached, though nobody may wait any more when the lender knows. Raises
        Overloaded without room, TransferFailed when the lender is of another cohort or the blocks could not be had."""
        lease, size = loan.lease, self._layout.block_size
        check_cohort(lease.worker_id, lease.cohort, self._cohort)
        if lease.key in self._leases:
            raise TransferFailed(f"{lease.key} is being copied already")
        num_tokens = size * len(loan.names)
        num_lent = len(transfer_entries(self._layout.groups, num_tokens, size))
        self._leases[lease.key] = lease
        try:
            reserved = await self._questions.reserve(Reserve(lease.key, num_tokens, names=loan.names))
            if reserved.block_ids is None:
                raise Overloaded(f"no room: {reserved.reason}", retry_after_s=1)
            if not is_worth(num_lent - sum(map(len, reserved.present))):
                self._send(Release(lease.key))
                await release(self._carriers, lease)
                return
            puller = Puller(
                self._layout, self._pool, reserved.block_ids, self._carriers.carrier(lease), lease,
                self._transfer.digests, present=reserved.present, num_lent=num_lent,
            )  # fmt: skip
            pulled = await puller.run(self._transfer.pull_timeout_s)
        except BaseException as error:
            self._send(Release(lease.key))
            if not isinstance(error, asyncio.CancelledError):  # else nobody waits, and the lease ends by itself
                await release(self._carriers, lease)
            raise
        finally:
            del self._leases[lease.key]
        self._send(Keep(lease.key, loan.names))
        came(pulled)
        await release(self._carriers, lease)
