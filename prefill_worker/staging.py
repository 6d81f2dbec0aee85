"""Staging: which slots of a ring are lent to which lease's owner.

1. `take` lends a slot to a lease; `room` waits for a free one, for as long as the lease lives;
2. `give_back` frees all that a lease has: its owner came back, which it does when it has copied them, or the lease has
   ended, which it does when its owner has died.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from engine.ring import OWN_SLOT, RingPool
from engine.types import Key


class Staging:
    def __init__(self, pool: RingPool) -> None:
        self.pool = pool
        self._holders: dict[int, Key | None] = {slot: None for slot in range(pool.ring.num_slots) if slot != OWN_SLOT}
        self._news = asyncio.Event()

    @property
    def num_lent(self) -> int:
        return sum(holder is not None for holder in self._holders.values())

    async def room(self, is_over: Callable[[], bool]) -> None:
        """Returns when a slot is free, or `is_over`, which is asked whenever slots are given back."""
        while not is_over() and all(holder is not None for holder in self._holders.values()):
            await self._news.wait()  # ends at the latest when a lease expires

    def take(self, key: Key) -> int | None:
        """A slot for this lease; None if all are lent."""
        slot = next((slot for slot, holder in self._holders.items() if holder is None), None)
        if slot is not None:
            self._holders[slot] = key
        return slot

    def give_back(self, key: Key) -> None:
        """All slots of a lease, which may have none. Whoever waits looks again."""
        for slot, holder in self._holders.items():
            if holder == key:
                self._holders[slot] = None
        self._news.set()
        self._news = asyncio.Event()
