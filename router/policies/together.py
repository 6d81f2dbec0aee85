"""Together: both phases on every worker. What ours does when no worker prefills alone, because the controller found
that a pool of their own gains nothing (few devices, or targets that leave much slack), or because all have died.

1. every decode worker: the prompts before it there + its own in chunks that the slack of those that decode allows, if
   nobody who comes after it in that queue is late by it, and there is room for it when it gets to decode;
2. of these the one with the least time, then the most cached;
3. else it is a case for admission (router/policies/admission.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import nsmallest

from engine.types import Role
from router.policies.admission import NEVER_S, TTFT, YIELDS, admitted, until_room, yields
from router.policies.beside import beside_s
from router.policies.fleet import Fleet
from router.policies.rankings import Option
from router.policies.room import free_from, room_on
from router.policies.snapshot import Decision, Refuse, Snapshot, Wait

MOST_LOOKED_AT = 8  # workers: those that are done with their prompts first


def together(snapshot: Snapshot, fleet: Fleet) -> Decision:
    """Some decode worker can be reached."""
    places = _soonest(snapshot, fleet)
    if yields(snapshot, (fleet[place] for place in places)):
        return Wait(YIELDS)
    options = sorted(_options(snapshot, fleet, places), key=lambda one: one.rank)
    for option in options:
        if not room_on(snapshot, option.first, snapshot.now + option.ttft_s).problem:
            return admitted(snapshot, option.placed(None), option.is_kind)
    if not options:  # those that decode leave no time for a prompt
        back_s = min(NEVER_S, max(0.0, min(fleet.first_end[place] for place in places) - snapshot.now))
        return Refuse(TTFT, back_s) if snapshot.ask.has_targets else Wait(TTFT)
    times = [(free_from(snapshot, one.first, snapshot.now + one.ttft_s, 0.0), one) for one in options]
    free_at, first = min(times, key=lambda one: (one[0], one[1].rank))
    at = snapshot.now + first.ttft_s
    return until_room(snapshot, first.ttft_s, free_at - at, room_on(snapshot, first.first, at).problem)


def _options(snapshot: Snapshot, fleet: Fleet, places: list[int]) -> Iterator[Option]:
    loads = fleet.at(places)
    due = snapshot.now + snapshot.ask.ttft_s
    for load, num_cached in zip(loads, snapshot.cached_on_each([load.name for load in loads]), strict=True):
        times = beside_s(snapshot, load, num_cached)
        if times is not None:
            waits_s, own_s = times
            before_s, spare_s = load.prompts.around_s(due, snapshot.now)
            yield Option(own_s <= spare_s, before_s + waits_s + own_s, own_s, num_cached, load)


def _soonest(snapshot: Snapshot, fleet: Fleet) -> list[int]:
    now, done_at, num_decodes = snapshot.now, fleet.done_at, fleet.num_decodes
    places = fleet.places(Role.DECODE)
    found = nsmallest(
        MOST_LOOKED_AT, places, key=lambda place: (max(now, done_at[place]), num_decodes[place], fleet[place].name)
    )
    if snapshot.ask.cached and len(places) > MOST_LOOKED_AT:
        most_cached = max(places, key=lambda place: snapshot.cached_on(fleet[place]))
        found += [] if most_cached in found else [most_cached]
    return found
