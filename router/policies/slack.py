"""Slack: how much of a prompt a decode worker can compute in one step without its sequences' being late."""

from __future__ import annotations

import math

from engine.step_shape import Chunk, StepShape
from router.policies.snapshot import Snapshot, WorkerLoad


def slack_tokens(snapshot: Snapshot, load: WorkerLoad, num_cached: int, limit_s: float) -> int:
    """Positions after `num_cached` in one step of at most `limit_s` beside all that decodes there; 0: none. What a step
    takes is taken to grow evenly with them, up to the engine's largest chunk."""
    limits, pool = snapshot.limits, load.member.pool
    num, tokens, _ = load.decodes.at(snapshot.now)
    num = max(num, load.stats.num_running)
    most = min(limits.prefill_chunk, limits.max_batch_tokens - num)
    if most <= 0 or num >= limits.max_batch_seqs:
        return 0
    if math.isinf(limit_s):
        return most
    alone_s = snapshot.predictor.decode_step_s(pool, num, round(tokens)) if num else 0.0
    full = StepShape((Chunk(num_cached, most),), num, round(tokens))
    full_s = snapshot.predictor.step_s(pool, full)
    if full_s <= limit_s:
        return most
    return max(0, math.floor(most * (limit_s - alone_s) / (full_s - alone_s))) if full_s > alone_s else 0


def free_tokens(snapshot: Snapshot, load: WorkerLoad) -> int:
    """What its free blocks hold."""
    return load.stats.num_free_blocks * snapshot.limits.block_size
