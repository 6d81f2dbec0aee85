"""Ours: the least predicted time to first token that keeps what was promised to everybody.

1. every prefill worker: the work before it there + its prefill with the prefix cached there, if nobody who comes after
   it in that queue is late by it;
2. every decode worker with slack: its prompt in chunks, each step inside the tightest target there, without a
   transfer, if it is clearly sooner so;
3. of these the one with the least time, then the most cached;
4. a decode worker with room for it when it gets there (router/policies/room.py): the fullest, so that slack gathers
   elsewhere; where it has no target, the one with the shortest step;
5. what does not fit is a case for admission (router/policies/admission.py).
Without a prefill worker every worker serves both phases (router/policies/together.py).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator

from engine.types import Role
from router.policies.admission import YIELDS, admitted, without_room, yields
from router.policies.beside import beside_s
from router.policies.fleet import Fleet, fleet_of
from router.policies.occupancy import with_one_more
from router.policies.pools import by_decode_work, by_prefill_work, pair
from router.policies.rankings import Option, by_fullness, quickest, slackest
from router.policies.rehearsal import Prompt
from router.policies.room import gap_s, room_in, room_on
from router.policies.snapshot import Decision, Snapshot, Wait, WorkerLoad
from router.policies.together import together

SOONER = 0.8  # times as late: a prompt beside those that decode takes of their slack, and has to gain by it
MOST_BESIDE = 3  # decode workers that are looked at for a prompt, those with the fewest sequences
MOST_REHEARSED = 3  # each takes as many steps as it has prompts


def slo(snapshot: Snapshot) -> Decision | None:
    fleet = fleet_of(snapshot.loads)
    prefill, decode = fleet.places(Role.PREFILL), fleet.places(Role.DECODE)
    if decode and not prefill and snapshot.ask.hand_off:
        return together(snapshot, fleet)
    if not (prefill and decode and snapshot.ask.hand_off):
        return pair(snapshot, by_prefill_work(snapshot), by_decode_work(snapshot))
    if yields(snapshot, (fleet[place] for place in prefill)):
        return Wait(YIELDS)
    beside = min(_beside(snapshot, fleet), key=lambda one: one.rank, default=None)
    apart = [option for cohort in fleet.cohorts(Role.DECODE) if (option := _apart(snapshot, fleet, cohort))]
    if not apart:  # no two workers can be paired
        return pair(snapshot, by_prefill_work(snapshot), by_decode_work(snapshot))
    best = min(apart, key=lambda one: one.rank)
    if beside is not None and (not best.is_kind or beside.ttft_s < SOONER * best.ttft_s):
        return admitted(snapshot, beside.placed(None))
    if snapshot.ask.is_prompt_only:
        return admitted(snapshot, best.placed(None), best.is_kind)
    for option in sorted(apart, key=lambda one: one.rank):
        target = _decode_worker(snapshot, fleet, option)
        if target is not None:
            return admitted(snapshot, option.placed(target.member), option.is_kind)
    if beside is not None:
        return admitted(snapshot, beside.placed(None))
    mates = fleet.at(fleet.places(Role.DECODE, best.first.member.cohort))
    return without_room(snapshot, best.first, best.ttft_s, best.own_s, mates)


def _apart(snapshot: Snapshot, fleet: Fleet, cohort: str) -> Option | None:
    """The best of the prefill workers: all are ranked by sums, and the best of these rehearsed."""
    found: Option | None = None
    for option in quickest(snapshot, fleet, cohort, MOST_REHEARSED):
        if found is not None and found.is_kind and found.ttft_s <= option.ttft_s:
            break  # a rehearsal finds no first token sooner than the sums
        rehearsed = _rehearsed(snapshot, option)
        found = rehearsed if found is None or rehearsed.rank < found.rank else found
    return found


def _rehearsed(snapshot: Snapshot, option: Option) -> Option:
    """With the time of the step's end in which its prompt is done, and what that means for those in the same step."""
    if not option.first.prompts.all:
        return option
    now, limits = snapshot.now, snapshot.limits
    num_new = snapshot.ask.num_tokens - option.num_cached
    new = Prompt(now + snapshot.ask.ttft_s, now, num_new, option.own_s, num_new)
    end, others = with_one_more(option.first.prompts, new, limits.prefill_chunk, limits.max_batch_tokens)
    is_kind = all(now + snapshot.margin.ttft_s(other - now) <= its_due for other, its_due in others)
    return Option(is_kind, max(end - now, option.own_s), option.own_s, option.num_cached, option.first)


def _beside(snapshot: Snapshot, fleet: Fleet) -> Iterator[Option]:
    """Decode workers without another prompt that can compute this one in chunks, each step inside the tightest target
    there, and then have room for the request. One that is empty has nobody to be careful of."""
    ask = snapshot.ask
    decode = fleet.at(slackest(snapshot, fleet, MOST_BESIDE))
    for load, num_cached in zip(decode, snapshot.cached_on_each([load.name for load in decode]), strict=True):
        num, _, tpot_s = load.decodes.at(snapshot.now)
        if math.isinf(tpot_s if num else ask.tpot_s):
            continue
        times = beside_s(snapshot, load, num_cached)
        if times is not None and not room_on(snapshot, load, snapshot.now + sum(times)).problem:
            yield Option(True, sum(times), times[1], num_cached, load)


def _decode_worker(snapshot: Snapshot, fleet: Fleet, option: Option) -> WorkerLoad | None:
    """One with room for what this option computes. They are tried from the fullest on, or from the emptiest, and those
    that are sure to be too full are passed over by halves."""
    at, packs = snapshot.now + option.ttft_s, math.isfinite(snapshot.ask.tpot_s)
    ranked = by_fullness(snapshot, fleet, option.first.member.cohort, at, fullest_first=packs)

    def has_room(number: int, with_gap: bool = True) -> bool:
        place, crowd = ranked[number]
        gap = gap_s(snapshot, option.first, fleet[place], option.own_s) if with_gap else 0.0
        return not room_in(snapshot, fleet[place], crowd, gap).problem

    first = bisect_left(range(len(ranked)), True, key=lambda number: has_room(number, False)) if packs else 0
    numbers = (*range(first, len(ranked)), *range(first))
    return next((fleet[ranked[number][0]] for number in numbers if has_room(number)), None)
