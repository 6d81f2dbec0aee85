"""Kept loads: those of all workers from one decision to the next, of which only those are made anew that are others.

1. `touch` hears of a worker on which something else is filed now;
2. `all` makes the loads anew of those that were touched, of those whose stream broke or came back, and of those on
   which a sequence has outlived its prediction; of the others it takes the newest reports in. When the workers are
   others, it makes all.

What is looked at in each decision is laid out side by side, in the order of the links, and compared as whole lists: a
look at one worker after the other would be the greatest part of a decision in a large cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import compress, count
from operator import is_not
from typing import Protocol

import numpy as np

from engine.types import EngineStats
from router.membership import Member
from router.policies.fleet import Fleet
from router.policies.snapshot import Name, WorkerLoad


class Link(Protocol):
    """A worker as it is known now: router.workers.WorkerLink."""

    @property
    def member(self) -> Member: ...

    @property
    def connected(self) -> bool: ...

    @property
    def stats(self) -> EngineStats: ...


class KeptLoads:
    """`make`: a load of what is known now."""

    def __init__(self, make: Callable[[Link, float], WorkerLoad]) -> None:
        self._make = make
        self._touched: set[Name] = set()
        self._places: dict[Name, int] = {}
        self._fleet = Fleet()
        self._members: list[Member] = []  # and what was known of each when its load was made:
        self._connected: list[bool] = []
        self._stats: list[EngineStats] = []

    def touch(self, worker: Name) -> None:
        self._touched.add(worker)

    def all(self, links: Collection[Link], now: float) -> Fleet:
        """In the order of the links."""
        linked, members = list(links), [link.member for link in links]
        connected, stats = [link.connected for link in links], [link.stats for link in links]
        if len(members) == len(self._members) and not any(map(is_not, members, self._members)):
            self._fleet.report(list(compress(count(), map(is_not, stats, self._stats))), stats.copy())
            for place in self._stale(connected, now):
                self._fleet.put(place, self._make(linked[place], now))
        else:
            self._members = members
            self._places = {member.name: place for place, member in enumerate(members)}
            self._fleet = Fleet([self._make(link, now) for link in linked])
        self._connected, self._stats = connected, stats
        self._touched.clear()
        return self._fleet.copy()

    def _stale(self, connected: list[bool], now: float) -> set[int]:
        """The places of those that are to be made anew."""
        stale = {self._places[name] for name in self._touched if name in self._places}
        if connected != self._connected:
            stale.update(compress(count(), map(is_not, connected, self._connected)))
        stale.update(np.flatnonzero(self._fleet.first_end < now).tolist())
        return stale
