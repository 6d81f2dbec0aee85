"""Room: can a decode worker take one more request at some time to come, so that all keep what was promised?

The step with it must keep the tightest target of all that still run then; its own average, the hand-off's gap included,
must keep its own; and the blocks must hold its prompt and growth, beside what the others have in the middle of what is
left of their lives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from router.policies.snapshot import Snapshot, WorkerLoad

SEATS, BLOCKS, TPOT = "seats", "blocks", "tpot"
USABLE = 0.98  # of the blocks: last blocks are full of half-used ones


# Sequences with the request, tokens of the others, and the tightest of their targets: a bare tuple, for there are
# hundreds in a decision.
Crowd = tuple[int, float, float]


@dataclass(frozen=True, slots=True)
class Room:
    """`problem`: why there is none, or empty. `step_s`: with the request, as predicted."""

    problem: str
    step_s: float


def room_on(snapshot: Snapshot, load: WorkerLoad, at: float, gap_s: float = 0.0) -> Room:
    """For the request of the snapshot, that gets there at this time; `gap_s`: its hand-off's."""
    crowd = crowd_on(snapshot, load, at)
    problem = lacks(snapshot, crowd[0], crowd[1], load.stats.num_blocks)
    return Room(problem, math.inf) if problem else room_in(snapshot, load, crowd, gap_s)


def crowd_on(snapshot: Snapshot, load: WorkerLoad, at: float) -> Crowd:
    """With whom it would share a step there."""
    num, tokens, tpot_s = load.decodes.at(at)
    num_others = max(0, load.stats.num_running - len(load.decodes.ends))  # other gateways'
    return num + num_others + snapshot.ask.num_answers, tokens, tpot_s


def lacks(snapshot: Snapshot, num: int, tokens: float, num_blocks: int) -> str:
    """What keeps the request out of such a crowd on a worker with so many blocks: a seat, or blocks. Empty: nothing."""
    ask, limits = snapshot.ask, snapshot.limits
    if num <= ask.num_answers:
        return ""  # an empty one takes whatever may come: answers beyond its seats take turns
    if num > limits.max_batch_seqs:
        return SEATS
    slots = (tokens + ask.num_tokens + ask.num_output * ask.num_answers) / limits.block_size + num / 2
    return BLOCKS if slots > USABLE * num_blocks else ""


def room_in(snapshot: Snapshot, load: WorkerLoad, crowd: Crowd, gap_s: float) -> Room:
    """Is such a step quick enough for everybody?"""
    ask, margin = snapshot.ask, snapshot.margin
    num, tokens, tpot_s = crowd
    context = round(tokens + ask.num_answers * (ask.num_tokens + ask.expected_output / 2))
    step_s = snapshot.predictor.decode_step_s(load.member.pool, num, context)
    late_s = step_s * margin.step_factor
    own_s = late_s + gap_s / max(1.0, ask.expected_output - 1)
    return Room(TPOT if late_s > tpot_s or own_s > ask.tpot_s else "", step_s)


def gap_s(snapshot: Snapshot, first: WorkerLoad, load: WorkerLoad, own_s: float) -> float:
    """What of the transfer is left when the first token is sampled, after a prefill of `own_s`: all but the last chunk
    travels meanwhile, if there is time. Or until a prompt is done there that has the worker to itself."""
    num_moved = snapshot.ask.num_tokens - snapshot.cached_on(load)
    num_last = min(num_moved, snapshot.limits.prefill_chunk)
    source, target, token_bytes = first.member.worker_id, load.member.worker_id, first.member.kv_token_bytes
    last_s = snapshot.predictor.transfer_s(source, target, num_last * token_bytes)
    stall_s = 0.0 if load.decodes.ends else load.prompts.left_s(snapshot.now + own_s)
    if num_last == num_moved:
        return max(stall_s, last_s)
    all_s = snapshot.predictor.transfer_s(source, target, num_moved * token_bytes)
    return max(stall_s, last_s, all_s - own_s * (1 - num_last / num_moved))


def free_from(snapshot: Snapshot, load: WorkerLoad, at: float, gap_s: float) -> float:
    """The first time from `at` on at which there is room, if nobody else comes: when somebody ends there. Infinite: not
    even when all have."""
    if not room_on(snapshot, load, at, gap_s).problem:
        return at
    ends = [end for end in load.decodes.ends if end > at]
    if not ends or room_on(snapshot, load, ends[-1], gap_s).problem:
        return math.inf
    low, high = 0, len(ends) - 1  # there is room from ends[high] on
    while low < high:
        middle = (low + high) // 2
        if room_on(snapshot, load, ends[middle], gap_s).problem:
            low = middle + 1
        else:
            high = middle
    return ends[high]
