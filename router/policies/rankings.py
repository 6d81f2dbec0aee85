"""Rankings of whole pools, by arrays (router/policies/fleet.py): who could compute a prompt first, and which decode
workers are the fullest. They say what would come of a look at each worker: few have anything that arrays do not show,
and these are looked at one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat

import numpy as np

from engine.types import Role
from router.membership import Pool
from router.policies.fleet import Fleet, Floats, Places
from router.policies.room import USABLE, Crowd, slots_of
from router.policies.snapshot import Snapshot, WorkerLoad

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


def quickest(snapshot: Snapshot, fleet: Fleet, cohort: str, most: int) -> list[Option]:
    """The prefill workers with the least time to the first token, the best first: who makes nobody late, then who is
    the quickest, has most of it cached, and by name."""
    places, now = fleet.places(Role.PREFILL, cohort), snapshot.now
    if not places.size:
        return []
    due = now + snapshot.ask.ttft_s
    num_cached = snapshot.cached_on_each(fleet.names(Role.PREFILL, cohort))
    own_s = _own_s(snapshot, Pool(cohort, Role.PREFILL), num_cached)
    ttfts_s = np.maximum(fleet.done_at[places] - now, 0.0) + own_s
    spares_s = np.full(len(places), np.inf)  # of those who come after it there
    for index in np.flatnonzero(fleet.last_due[places] > due).tolist():
        before_s, spares_s[index] = fleet[places.item(index)].prompts.around_s(due, now)
        ttfts_s[index] = before_s + own_s[index]
    is_unkind = own_s > spares_s
    near = _least(np.where(is_unkind, np.inf, ttfts_s), most)
    minus_cached = [-num_cached[index] for index in near.tolist()]
    order = np.lexsort((fleet.turn[places[near]], minus_cached, ttfts_s[near], is_unkind[near]))
    return [
        Option(
            not is_unkind.item(index), ttfts_s.item(index), own_s.item(index), num_cached[index],
            fleet[places.item(index)],
        )
        for index in near[order[:most]].tolist()
    ]  # fmt: skip


def _own_s(snapshot: Snapshot, pool: Pool, num_cached: list[int]) -> Floats:
    """Seconds of the prompt alone on each of a pool; few have different numbers cached."""
    prefill_s, chunk, num_tokens = snapshot.predictor.prefill_s, snapshot.limits.prefill_chunk, snapshot.ask.num_tokens
    times_s = {count: prefill_s(pool, num_tokens - count, count, chunk) for count in set(num_cached)}
    return np.array([times_s[count] for count in num_cached])


def _least(values: Floats, most: int) -> Places:
    """Where the least ones are, and all that equal the last of them."""
    if len(values) <= most:
        return np.arange(len(values))
    return np.flatnonzero(values <= np.partition(values, most - 1)[most - 1])


def slackest(snapshot: Snapshot, fleet: Fleet, most: int) -> Places:
    """Decode workers without a prompt: those with the fewest sequences, then the fewest tokens, and where the most of
    this prompt is cached."""
    places = fleet.places(Role.DECODE)
    places = places[np.isneginf(fleet.last_due[places])]
    if places.size <= most:
        return places
    order = np.lexsort((fleet.turn[places], fleet.tokens[places], fleet.num_decodes[places]))
    num_cached = snapshot.cached_on_each([load.name for load in fleet.at(places)]) if snapshot.ask.cached else []
    best = [num_cached.index(max(num_cached))] if any(num_cached) else []
    return places[np.unique([*order[:most].tolist(), *best])]


def by_fullness(
    snapshot: Snapshot, fleet: Fleet, cohort: str, at: float, fullest_first: bool
) -> list[tuple[int, Crowd]]:
    """Places of decode workers with a seat and blocks for the request at this time, and with whom it would share a step
    there: the fullest first or the emptiest; where there is a choice, not who has just refused it."""
    places, ask = fleet.places(Role.DECODE, cohort), snapshot.ask
    num_left, tokens, tpots_s = fleet.num_decodes[places], fleet.tokens[places], fleet.tpot_s[places]
    num_others = np.maximum(fleet.num_running[places] - num_left, 0)  # other gateways'
    for index in np.flatnonzero(fleet.first_end[places] <= at).tolist():  # somebody ends there until then
        num_left[index], tokens[index], tpots_s[index] = fleet[places.item(index)].decodes.at(at)
    nums = num_left + num_others + ask.num_answers
    has_blocks = slots_of(snapshot, nums.astype(np.float64), tokens) <= USABLE * fleet.num_blocks[places]
    fits = (nums <= snapshot.limits.max_batch_seqs) & has_blocks
    sign = -1 if fullest_first else 1
    order = np.lexsort((fleet.turn[places], sign * tokens, sign * nums))
    ranked = order[(fits | (nums <= ask.num_answers))[order]]  # an empty one takes whatever may come
    crowds = zip(nums[ranked].tolist(), tokens[ranked].tolist(), tpots_s[ranked].tolist(), repeat(""), strict=False)
    found = list(zip(places[ranked].tolist(), crowds, strict=True))
    if ask.refused_by is not None:
        found.sort(key=lambda one: fleet[one[0]].name == ask.refused_by)
    return found
