"""Mooncake's Conductor (FAST 2025, algorithm 1): the prefill worker with the least queue + prefill, with its own cached
prefix or, where another has much more, with that one and the time to move it; then the decode worker with the least
time between tokens. If either is beyond its target, 429.

Known defects, kept: decode's load is judged as it is now, not when the request will get there, so that under overload
admission swings (the paper's arXiv version says so, and predicts instead); the threshold is set by hand; nobody is
protected from who comes after.
"""

from __future__ import annotations

from engine.types import Role
from router.policies.pools import pair, queue_s
from router.policies.snapshot import Decision, Placement, Refuse, Snapshot, WorkerLoad

BALANCING_THRESHOLD = 2.0  # how many times as much the best prefix must be, to be moved; "adjusted manually"
RETRY_AFTER_S = 1.0  # the paper says nothing of it


def mooncake(snapshot: Snapshot) -> Decision | None:
    pool = sorted(snapshot.pool(Role.PREFILL), key=lambda load: load.member.worker_id)
    best = max(pool, key=snapshot.cached_on, default=None)
    times = {load.name: _ttft_s(snapshot, load, best or load) for load in pool}
    prefill = sorted(pool, key=lambda load: times[load.name])
    gaps = {load.name: _tbt_s(snapshot, load) for load in snapshot.pool(Role.DECODE)}
    decode = sorted(snapshot.pool(Role.DECODE), key=lambda load: (gaps[load.name], load.member.worker_id))
    placement = pair(snapshot, prefill, decode)
    if placement is None or placement.decode is None:
        return placement
    ttft_s = times[(placement.first.worker_id, placement.first.incarnation)]
    if ttft_s > snapshot.ask.ttft_s:
        return Refuse("ttft", RETRY_AFTER_S)
    if gaps[(placement.decode.worker_id, placement.decode.incarnation)] > snapshot.ask.tpot_s:
        return Refuse("tpot", RETRY_AFTER_S)
    return Placement(placement.first, placement.decode, ttft_s)


def _ttft_s(snapshot: Snapshot, load: WorkerLoad, best: WorkerLoad) -> float:
    own, most = snapshot.cached_on(load), snapshot.cached_on(best)
    queued_s, cohort = queue_s(snapshot, load), load.member.cohort
    if most <= BALANCING_THRESHOLD * own or best.member.cohort != cohort:
        return queued_s + snapshot.prefill_s(load)
    size_bytes = (most - own) * load.member.kv_token_bytes
    moved_s = snapshot.predictor.transfer_s(best.member.worker_id, load.member.worker_id, size_bytes)
    left, chunk = snapshot.ask.num_tokens - most, snapshot.limits.prefill_chunk
    return queued_s + moved_s + snapshot.predictor.prefill_s(load.member.pool, left, most, chunk)


def _tbt_s(snapshot: Snapshot, load: WorkerLoad) -> float:
    """A step with it, as the load is now."""
    num, tokens, _ = load.decodes.at(snapshot.now)
    count = max(num, load.stats.num_running) + snapshot.ask.num_answers
    return snapshot.predictor.decode_step_s(load.member.pool, count, round(tokens) + snapshot.ask.num_tokens)
