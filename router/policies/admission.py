"""Admission: what becomes of a request whose targets the best placement would not keep, or that nobody has room for.

- its first token would be late: waiting makes it no earlier, so it is refused, until the queue is so much shorter;
- no decode worker has room when it gets there: it waits at the gateway for those who end, if its first token can wait
  so long; else it is refused until then. Without a target it can;
- one of a class that yields waits while requests with targets come and the prefill workers have prompts.
Predictions are of the time at which the request gets to decode (router/policies/room.py), so that a lull in one pool
lets in no more than the other will have room for: judged by the present, admission swings (Mooncake, arXiv 2407.00079).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from heapq import nsmallest

from engine.types import Role
from router.policies.pools import num_sequences
from router.policies.room import free_from, gap_s, room_on
from router.policies.snapshot import Decision, Placement, Refuse, Snapshot, Wait, WorkerLoad

TTFT, YIELDS = "ttft", "yields"
NEVER_S = 60.0  # no load is so low that it would help: come back when the cluster has changed
MOST_LOOKED_AT = 8  # decode workers, the least loaded: each takes a few predictions


def admitted(snapshot: Snapshot, placement: Placement, is_kind: bool = True) -> Decision:
    """With its first token in time, and those of others (`is_kind`); or refused."""
    own_s = placement.own_s
    assert placement.ttft_s is not None and own_s is not None
    late_s = snapshot.margin.ttft_s(placement.ttft_s) - snapshot.ask.ttft_s
    if snapshot.margin.ttft_s(own_s) > snapshot.ask.ttft_s:
        return Refuse(TTFT, NEVER_S)
    if not is_kind and math.isinf(snapshot.ask.ttft_s):
        return Wait(YIELDS)
    if late_s > 0 or not is_kind:
        return Refuse(TTFT, _retry_after_s(snapshot, max(late_s, own_s)))
    return placement


def without_room(
    snapshot: Snapshot, first: WorkerLoad, ttft_s: float, own_s: float, decode: Sequence[WorkerLoad]
) -> Decision:
    """No decode worker of its cohort has room for it when `first` has computed its prompt."""
    at = snapshot.now + ttft_s
    least = nsmallest(MOST_LOOKED_AT, decode, key=lambda load: (num_sequences(load), load.member.worker_id))
    times = [(free_from(snapshot, load, at, gap), load, gap) for load in least
             for gap in [gap_s(snapshot, first, load, own_s)]]  # fmt: skip
    free_at, load, gap = min(times, key=lambda one: (one[0], one[1].member.worker_id))
    return until_room(snapshot, ttft_s, free_at - at, room_on(snapshot, load, at, gap).problem)


def until_room(snapshot: Snapshot, ttft_s: float, late_s: float, reason: str) -> Decision:
    """There is room so much later than its first token would come, infinitely if never."""
    spare_s = snapshot.ask.ttft_s - snapshot.margin.ttft_s(ttft_s)
    if spare_s < 0:
        return Refuse(TTFT, _retry_after_s(snapshot, -spare_s))
    if late_s <= spare_s and (math.isfinite(late_s) or not snapshot.ask.has_targets):
        return Wait(reason, spare_s)
    if not math.isfinite(late_s):
        return Refuse(reason, NEVER_S)
    return Refuse(reason, max(0.0, late_s - spare_s))


def yields(snapshot: Snapshot, prefill: Iterable[WorkerLoad]) -> bool:
    """Must it wait for requests with targets, because every prefill worker has prompts to compute?"""
    is_last = snapshot.ask.priority > 0 and not snapshot.ask.has_targets
    return is_last and snapshot.promised_of_late and all(load.prompts.dues for load in prefill)


def _retry_after_s(snapshot: Snapshot, late_s: float) -> float:
    """A queue gets shorter as time passes, but for those who have been told to come back before."""
    num_workers = len(snapshot.pool(Role.PREFILL)) or len(snapshot.pool(Role.DECODE)) or 1
    return min(NEVER_S, late_s + sum(one.compute_s for one in snapshot.memory.returns) / num_workers)
