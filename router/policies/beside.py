"""Beside: a prompt on a worker that decodes, in chunks that the slack of those there allows."""

from __future__ import annotations

import math

from engine.slack import HEADROOM, MIN_CHUNK
from engine.step_shape import Chunk, StepShape
from router.policies.slack import slack_tokens
from router.policies.snapshot import Snapshot, WorkerLoad


def beside_s(snapshot: Snapshot, load: WorkerLoad, num_cached: int) -> tuple[float, float] | None:
    """Seconds until the step under way ends, and that the prompt takes then, with nothing before it; None: those there
    leave no time for it. One that is empty has nobody to be careful of."""
    num, tokens, tpot_s = load.decodes.at(snapshot.now)
    num_new = snapshot.ask.num_tokens - num_cached
    size = min(num_new, slack_tokens(snapshot, load, num_cached, HEADROOM * tpot_s if num else math.inf))
    if size < min(num_new, MIN_CHUNK, snapshot.limits.prefill_chunk):
        return None
    middle = Chunk(num_cached + (num_new - size) // 2, size)  # steps get longer evenly
    step_s = snapshot.predictor.step_s(load.member.pool, StepShape((middle,), num, round(tokens)))
    waits_s = snapshot.predictor.decode_step_s(load.member.pool, num, round(tokens)) if num else 0.0
    return waits_s, step_s * num_new / size
