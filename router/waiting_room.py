"""The waiting room: requests that no worker should have yet, in order of their class and of when they are due.

1. `wait` gives a request its seat until it is called, or until a time; the room has so many seats;
2. `call` calls the first few: something has changed. Who is called decides again, and comes back to the same place.
It polls nothing.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from heapq import nsmallest

CALLED_AT_ONCE = 4  # whoever is placed calls the next


@dataclass(order=True, slots=True)
class Ticket:
    """Of one request, for as long as it waits. `number`: first come, first served among equals."""

    priority: int
    due: float
    number: int
    called: asyncio.Event = field(default_factory=asyncio.Event, compare=False)


class WaitingRoom:
    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._tickets: dict[int, Ticket] = {}
        self._num_given = 0

    def __len__(self) -> int:
        return len(self._tickets)

    @property
    def is_full(self) -> bool:
        return len(self._tickets) >= self._max_waiting

    def enter(self, priority: int, due: float) -> Ticket:
        self._num_given += 1
        ticket = self._tickets[self._num_given] = Ticket(priority, due, self._num_given)
        return ticket

    def leave(self, ticket: Ticket) -> None:
        del self._tickets[ticket.number]

    def has_before(self, priority: int, due: float) -> bool:
        """Does somebody wait whose turn is before that of such a request?"""
        return any((one.priority, one.due) <= (priority, due) for one in self._tickets.values())

    def call(self) -> None:
        for ticket in nsmallest(CALLED_AT_ONCE, self._tickets.values()):
            ticket.called.set()
