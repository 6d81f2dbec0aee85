"""Rankings of whole pools, by the columns of a fleet (router/policies/fleet.py): who could compute a prompt first, and
which decode workers are the fullest. They say what would come of a look at each worker's load: few have anything that
the columns do not show, and only these are looked at.
"""

from __future__ import annotations

import math
from bisect import insort
from dataclasses import dataclass
from heapq import nsmallest
from operator import itemgetter

from engine.types import Role
from router.membership import Member, Pool
from router.policies.fleet import Fleet
from router.policies.room import Crowd, crowd_on, lacks
from router.policies.snapshot import Placement, Snapshot, WorkerLoad

Rank = tuple[bool, float, int, str]  # is anybody late, seconds, minus what is cached, worker id


@dataclass(frozen=True, slots=True)
class Option:
    """A worker that could compute the prompt. `own_s`: of the prompt alone; `is_kind`: nobody is late by it."""

    is_kind: bool
    ttft_s: float
    own_s: float
    num_cached: int
    first: WorkerLoad

    @property
    def rank(self) -> Rank:
        return not self.is_kind, self.ttft_s, -self.num_cached, self.first.member.worker_id

    def placed(self, decode: Member | None) -> Placement:
        return Placement(self.first.member, decode, self.ttft_s, self.own_s)


def quickest(snapshot: Snapshot, fleet: Fleet, cohort: str, most: int) -> list[Option]:
    """The prefill workers with the least time to the first token by sums, in the order of their ranks."""
    now, num_tokens, chunk = snapshot.now, snapshot.ask.num_tokens, snapshot.limits.prefill_chunk
    due, prefill_s, pool = now + snapshot.ask.ttft_s, snapshot.predictor.prefill_s, Pool(cohort, Role.PREFILL)
    done_at, last_due, names = fleet.done_at, fleet.last_due, fleet.names(Role.PREFILL, cohort)
    times_s: dict[int, float] = {}  # by what is cached: few numbers are different
    best: list[tuple[Rank, float, int]] = []
    limit_s = math.inf  # who takes longer is not among the best
    for place, name, num_cached in zip(
        fleet.places(Role.PREFILL, cohort), names, snapshot.cached_on_each(names), strict=True
    ):
        before_s, spare_s = done_at[place] - now, math.inf
        if last_due[place] > due:  # it goes before others
            before_s, spare_s = fleet[place].prompts.around_s(due, now)
        if before_s > limit_s:
            continue
        own_s = times_s.get(num_cached)
        if own_s is None:
            own_s = times_s[num_cached] = prefill_s(pool, num_tokens - num_cached, num_cached, chunk)
        ttft_s = before_s + own_s if before_s > 0.0 else own_s
        if ttft_s > limit_s:
            continue
        insort(best, ((own_s > spare_s, ttft_s, -num_cached, name[0]), own_s, place), key=itemgetter(0))
        if len(best) >= most:
            del best[most:]
            (is_last_unkind, last_s, *_), *_ = best[-1]
            limit_s = math.inf if is_last_unkind else last_s
    return [
        Option(not is_unkind, ttft_s, own_s, -minus_cached, fleet[place])
        for (is_unkind, ttft_s, minus_cached, _), own_s, place in best
    ]


def slackest(snapshot: Snapshot, fleet: Fleet, most: int) -> list[int]:
    """Places of decode workers without a prompt: those with the fewest sequences, then the fewest tokens, and where the
    most of this prompt is cached."""
    last_due, num_decodes, tokens = fleet.last_due, fleet.num_decodes, fleet.tokens
    idle = [place for place in fleet.places(Role.DECODE) if last_due[place] == -math.inf]
    found = nsmallest(most, idle, key=lambda place: (num_decodes[place], tokens[place], fleet[place].name))
    if snapshot.ask.cached and len(idle) > most:
        most_cached = max(idle, key=lambda place: snapshot.cached_on(fleet[place]))
        found += [] if most_cached in found else [most_cached]
    return found


def by_fullness(
    snapshot: Snapshot, fleet: Fleet, cohort: str, at: float, fullest_first: bool
) -> list[tuple[int, Crowd]]:
    """Places of decode workers with a seat and blocks for the request at this time, and with whom it would share a step
    there: the fullest first or the emptiest; where there is a choice, not who has just refused it."""
    ask, sign, first_end = snapshot.ask, -1 if fullest_first else 1, fleet.first_end
    all_decodes, all_running, all_blocks = fleet.num_decodes, fleet.num_running, fleet.num_blocks
    all_tokens, all_tpots_s, names = fleet.tokens, fleet.tpot_s, fleet.names(Role.DECODE, cohort)
    ranked: list[tuple[bool, int, float, str, int, Crowd]] = []
    for place, name in zip(fleet.places(Role.DECODE, cohort), names, strict=True):
        if first_end[place] <= at:  # who ends there by then shows in its load alone
            crowd = crowd_on(snapshot, fleet[place], at)
        else:
            num = max(all_decodes[place], all_running[place]) + ask.num_answers
            crowd = num, all_tokens[place], all_tpots_s[place]
        num, tokens, _ = crowd
        if not lacks(snapshot, num, tokens, all_blocks[place]):
            ranked.append((name == ask.refused_by, sign * num, sign * tokens, name[0], place, crowd))
    ranked.sort()
    return [(place, crowd) for *_, place, crowd in ranked]
