"""Ours: the least predicted time to first token that keeps what was promised to everybody.

1. every prefill worker: the work before it there + its prefill with the prefix cached there, if nobody who comes after
   it in that queue is late by it;
2. every decode worker with slack: its prompt in chunks, each step inside the tightest target there, without a
   transfer, if it is clearly sooner so;
3. of these the one with the least time, then the most cached;
4. a decode worker with room for it when it gets there (router/policies/room.py): the fullest, so that slack gathers
   elsewhere; where it has no target, the one with the shortest step;
5. what does not fit is a case for admission (router/policies/admission.py).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

from engine.slack import HEADROOM, MIN_CHUNK
from engine.step_shape import Chunk, StepShape
from engine.types import Role
from router.policies.admission import YIELDS, admitted, without_room, yields
from router.policies.occupancy import with_one_more
from router.policies.pools import by_decode_work, by_prefill_work, pair
from router.policies.rehearsal import Prompt
from router.policies.room import crowds_on, gap_s, room_in, room_on
from router.policies.slack import slack_tokens
from router.policies.snapshot import Decision, Placement, Snapshot, Wait, WorkerLoad

SOONER = 0.8  # times as late: a prompt beside those that decode takes of their slack, and has to gain by it
MOST_REHEARSED = 3  # each takes as many steps as it has prompts

Rank = tuple[bool, float, int, str]  # is anybody late, seconds, minus what is cached, worker id


@dataclass(frozen=True, slots=True)
class Option:
    """A worker that could compute the prompt. `is_kind`: nobody is late by it."""

    is_kind: bool
    ttft_s: float
    own_s: float
    num_cached: int
    first: WorkerLoad

    @property
    def rank(self) -> Rank:
        return not self.is_kind, self.ttft_s, -self.num_cached, self.first.member.worker_id


def slo(snapshot: Snapshot) -> Decision | None:
    prefill, decode = snapshot.pool(Role.PREFILL), snapshot.pool(Role.DECODE)
    if not (prefill and decode and snapshot.ask.hand_off):
        return pair(snapshot, by_prefill_work(snapshot), by_decode_work(snapshot))
    if yields(snapshot, prefill):
        return Wait(YIELDS)
    beside = min(_beside(snapshot, decode), key=lambda one: one.rank, default=None)
    apart = [
        option
        for cohort in dict.fromkeys(load.member.cohort for load in decode)
        if (option := _apart(snapshot, [load for load in prefill if load.member.cohort == cohort]))
    ]
    if not apart:  # no two workers can be paired
        return pair(snapshot, by_prefill_work(snapshot), by_decode_work(snapshot))
    best = min(apart, key=lambda one: one.rank)
    if beside is not None and (not best.is_kind or beside.ttft_s < SOONER * best.ttft_s):
        return admitted(snapshot, Placement(beside.first.member, None, beside.ttft_s), beside.own_s)
    if snapshot.ask.is_prompt_only:
        return admitted(snapshot, Placement(best.first.member, None, best.ttft_s), best.own_s, best.is_kind)
    for option in sorted(apart, key=lambda one: one.rank):
        target = _decode_worker(snapshot, option, decode)
        if target is not None:
            placement = Placement(option.first.member, target.member, option.ttft_s)
            return admitted(snapshot, placement, option.own_s, option.is_kind)
    if beside is not None:
        return admitted(snapshot, Placement(beside.first.member, None, beside.ttft_s), beside.own_s)
    mates = [load for load in decode if load.member.cohort == best.first.member.cohort]
    return without_room(snapshot, best.first, best.ttft_s, best.own_s, mates)


def _apart(snapshot: Snapshot, prefill: Sequence[WorkerLoad]) -> Option | None:
    """The best of the prefill workers: all are ranked by sums, and the best of these rehearsed."""
    now = snapshot.now
    due = now + snapshot.ask.ttft_s
    best: list[tuple[Rank, float, WorkerLoad]] = []
    last: Rank = (True, math.inf, 1, "")  # that is among the best
    prefill_s, chunk = snapshot.predictor.prefill_s, snapshot.limits.prefill_chunk
    times_s: dict[int, float] = {}  # by what is cached: few workers have anything
    for load, num_cached in zip(prefill, snapshot.cached_on_each(prefill), strict=True):
        own_s = times_s.get(num_cached)
        if own_s is None:
            num_new = snapshot.ask.num_tokens - num_cached
            own_s = times_s[num_cached] = prefill_s(load.member.pool, num_new, num_cached, chunk)
        prompts = load.prompts
        place = bisect_right(prompts.dues, due)  # as in prompts.around_s
        done_at = prompts.done_at[place]
        ttft_s = done_at - now + own_s if done_at > now else own_s
        rank = (own_s > prompts.slacks_s[place], ttft_s, -num_cached, load.member.worker_id)
        if rank < last:
            insort(best, (rank, own_s, load), key=itemgetter(0))
            if len(best) >= MOST_REHEARSED:
                del best[MOST_REHEARSED:]
                last = best[-1][0]
    found: Option | None = None
    for (is_unkind, ttft_s, minus_cached, _), own_s, load in best:
        if found is not None and found.is_kind and found.ttft_s <= ttft_s:
            break  # a rehearsal finds no first token sooner than the sums
        option = _rehearsed(snapshot, Option(not is_unkind, ttft_s, own_s, -minus_cached, load), due)
        found = option if found is None or option.rank < found.rank else found
    return found


def _rehearsed(snapshot: Snapshot, option: Option, due: float) -> Option:
    """With the time of the step's end in which its prompt is done, and what that means for those in the same step."""
    if not option.first.prompts.all:
        return option
    now, limits = snapshot.now, snapshot.limits
    num_new = snapshot.ask.num_tokens - option.num_cached
    new = Prompt(due, now, num_new, option.own_s, num_new)
    end, others = with_one_more(option.first.prompts, new, limits.prefill_chunk, limits.max_batch_tokens)
    is_kind = all(now + snapshot.margin.ttft_s(other - now) <= its_due for other, its_due in others)
    return replace(option, ttft_s=max(end - now, option.own_s), is_kind=is_kind)


def _beside(snapshot: Snapshot, decode: Sequence[WorkerLoad]) -> Iterator[Option]:
    """Decode workers without another prompt that can compute this one in chunks, each step inside the tightest target
    there, and then have room for the request. One that is empty has nobody to be careful of."""
    ask = snapshot.ask
    for load, num_cached in zip(decode, snapshot.cached_on_each(decode), strict=True):
        num, tokens, tpot_s = load.decodes.at(snapshot.now)
        if load.prompts.dues or math.isinf(tpot_s if num else ask.tpot_s):
            continue
        num_new = ask.num_tokens - num_cached
        size = min(num_new, slack_tokens(snapshot, load, num_cached, HEADROOM * tpot_s))
        if size < min(num_new, MIN_CHUNK):
            continue
        middle = Chunk(num_cached + (num_new - size) // 2, size)  # steps get longer evenly
        step_s = snapshot.predictor.step_s(load.member.pool, StepShape((middle,), num, round(tokens)))
        own_s = step_s * num_new / size
        waits_s = snapshot.predictor.decode_step_s(load.member.pool, num, round(tokens)) if num else 0.0
        if not room_on(snapshot, load, snapshot.now + waits_s + own_s).problem:
            yield Option(True, waits_s + own_s, own_s, num_cached, load)


def _decode_worker(snapshot: Snapshot, option: Option, decode: Sequence[WorkerLoad]) -> WorkerLoad | None:
    """One with room for what this option computes; where there is a choice, not who has just refused it. They are tried
    from the fullest on, or from the emptiest, and those that are sure to be too full are passed over by halves."""
    at, packs, ask = snapshot.now + option.ttft_s, math.isfinite(snapshot.ask.tpot_s), snapshot.ask
    ranked: list[tuple[bool, float, float, str, int]] = []
    sign = -1 if packs else 1
    mates = [load for load in decode if load.member.cohort == option.first.member.cohort]
    crowds = crowds_on(snapshot, mates, at)
    for index, (num, tokens, _, problem) in enumerate(crowds):
        if not problem:
            member = mates[index].member
            ranked.append((member.name == ask.refused_by, sign * num, sign * tokens, member.worker_id, index))
    ranked.sort()

    def has_room(number: int, with_gap: bool = True) -> bool:
        index = ranked[number][-1]
        load, crowd = mates[index], crowds[index]
        gap = gap_s(snapshot, option.first, load, option.own_s) if with_gap else 0.0
        return not room_in(snapshot, load, crowd, gap).problem

    first = bisect_left(range(len(ranked)), True, key=lambda number: has_room(number, False)) if packs else 0
    numbers = (*range(first, len(ranked)), *range(first))
    return next((mates[ranked[number][-1]] for number in numbers if has_room(number)), None)
