"""Which workers serve a request: pure, from loads to a placement.

Least predicted work: the prefill worker with the fewest prompt tokens before ours, then the decode worker with the
fewest sequences, of the same cohort. When a whole pool is gone the other serves both phases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.types import EngineStats, Role
from router.membership import Member


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What the router knows of a worker now: its own placements there, and the worker's last report."""

    member: Member
    connected: bool
    num_sequences: int  # live requests placed here
    num_prompt_tokens: int  # of those still without a first token
    stats: EngineStats


@dataclass(frozen=True, slots=True)
class Placement:
    """`first` computes the prompt; `decode` goes on, or None when `first` does it all."""

    first: Member
    decode: Member | None


def choose(loads: Sequence[WorkerLoad], hand_off: bool = True) -> Placement | None:
    """The placement with the least predicted work, or None if no worker can be reached. Without `hand_off` one worker
    does all of it, a decode worker if there is one: that is where the request is not in the way of prompts."""
    usable = [load for load in loads if load.connected]
    prefill = sorted((load for load in usable if load.member.role is Role.PREFILL), key=prefill_work)
    decode = sorted((load for load in usable if load.member.role is Role.DECODE), key=decode_work)
    for first in prefill if hand_off else ():
        for second in decode:
            if first.member.cohort == second.member.cohort:
                return Placement(first.member, second.member)
    alone = (prefill or decode) if hand_off else (decode or prefill)
    return Placement(alone[0].member, None) if alone else None


def prefill_work(load: WorkerLoad) -> tuple[int, str]:
    """Prompt tokens before a new request; ties go by name, so that equal inputs choose equally."""
    return max(load.num_prompt_tokens, load.stats.num_waiting_tokens), load.member.worker_id


def decode_work(load: WorkerLoad) -> tuple[int, int, str]:
    """Sequences in the step, then blocks in use."""
    running = max(load.num_sequences, load.stats.num_running + load.stats.num_waiting)
    return running, load.stats.num_blocks - load.stats.num_free_blocks, load.member.worker_id
