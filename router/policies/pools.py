"""What policies share: orders of workers, and pairs of equal cohort."""

from __future__ import annotations

from collections.abc import Sequence

from engine.types import Role
from router.policies.snapshot import Placement, Snapshot, WorkerLoad


def pair(snapshot: Snapshot, prefill: Sequence[WorkerLoad], decode: Sequence[WorkerLoad]) -> Placement | None:
    """The first two of equal cohort, both pools in the order of preference. When a whole pool is gone, or nothing can
    be handed off, one worker does all of it: where there is no hand-off a decode worker, which is where the request is
    not in the way of prompts. None: nobody can be reached."""
    for first in prefill if snapshot.ask.hand_off else ():
        for second in decode:
            if first.member.cohort == second.member.cohort:
                return Placement(first.member, second.member)
    alone = (prefill or decode) if snapshot.ask.hand_off else (decode or prefill)
    return Placement(alone[0].member, None) if alone else None


def by_prefill_work(snapshot: Snapshot) -> list[WorkerLoad]:
    return sorted(snapshot.pool(Role.PREFILL), key=prefill_work)


def by_decode_work(snapshot: Snapshot) -> list[WorkerLoad]:
    return sorted(snapshot.pool(Role.DECODE), key=decode_work)


def prefill_work(load: WorkerLoad) -> tuple[int, str]:
    """Prompt tokens before a new request; ties go by name, so that equal inputs choose equally."""
    return max(load.num_prompt_tokens, load.stats.num_waiting_tokens), load.member.worker_id


def decode_work(load: WorkerLoad) -> tuple[int, int, str]:
    """Sequences in the step, then blocks in use."""
    return num_sequences(load), load.stats.num_blocks - load.stats.num_free_blocks, load.member.worker_id


def num_sequences(load: WorkerLoad) -> int:
    return max(load.num_sequences, load.stats.num_running + load.stats.num_waiting)


def queue_s(snapshot: Snapshot, load: WorkerLoad) -> float:
    """All prompts there that have no first token, as predicted."""
    return load.prompts.left_s(snapshot.now)
