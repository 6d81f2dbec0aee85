"""Kept loads: those of all workers from one decision to the next, of which only those are made anew that are others.

1. `touch` hears of a worker on which something else is filed now; `heard` of one that has reported, and takes that in,
   or whose stream broke; `members_changed` of all else;
2. `all` makes the loads anew of those that were touched, and of those on which a sequence has outlived its prediction.
   When the members are others, it makes all.

So nothing is asked of a worker of which there is no news: in a large cluster a look at each would be the greatest part
of a decision. Of some a report does not stand until the next one (`Link.stats_stand`); they are asked every time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

from engine.types import EngineStats
from router.membership import Member
from router.policies.fleet import Fleet
from router.policies.snapshot import Name, WorkerLoad


class Link(Protocol):
    """A worker as it is known now: router.workers.WorkerLink."""

    @property
    def member(self) -> Member: ...

    @property
    def takes_requests(self) -> bool:
        """Can it be reached, and does its pool route to it?"""
        ...

    @property
    def stats(self) -> EngineStats: ...

    @property
    def stats_stand(self) -> bool:
        """Until the worker is heard again?"""
        ...


class KeptLoads:
    """`make`: a load of what is known now."""

    def __init__(self, make: Callable[[Link, float], WorkerLoad]) -> None:
        self._make = make
        self._links: list[Link] = []
        self._places: dict[Name, int] = {}
        self._changing: list[int] = []  # places of those whose stats do not stand
        self._fleet = Fleet()
        self._touched: dict[Name, None] = {}
        self._are_others = True  # the members, since all loads were made

    def touch(self, worker: Name) -> None:
        self._touched[worker] = None

    def heard(self, worker: Name) -> None:
        place = self._places.get(worker)
        if place is not None and not self._are_others:
            self._hear(place)

    def members_changed(self) -> None:
        self._are_others = True

    def all(self, links: Collection[Link], now: float) -> Fleet:
        """In the order of the links."""
        if self._are_others:
            self._begin(links, now)
        else:
            for place in self._changing:
                self._hear(place)
            for place in self._stale(now):
                self._fleet.put(place, self._make(self._links[place], now))
        self._touched.clear()
        return self._fleet.copy()

    def _begin(self, links: Collection[Link], now: float) -> None:
        self._links, self._are_others = list(links), False
        self._places = {link.member.name: place for place, link in enumerate(self._links)}
        self._changing = [place for place, link in enumerate(self._links) if not link.stats_stand]
        self._fleet = Fleet([self._make(link, now) for link in self._links])

    def _hear(self, place: int) -> None:
        link = self._links[place]
        if link.takes_requests is self._fleet.is_connected(place):
            self._fleet.report(place, link.stats)
        else:
            self._touched[link.member.name] = None

    def _stale(self, now: float) -> list[int]:
        touched = {self._places[worker] for worker in self._touched if worker in self._places}
        return sorted(touched.union([place for place, end in enumerate(self._fleet.first_end) if end < now]))
