"""Which workers serve a request: pure, from loads to a placement.

- least_work: the prefill worker with the fewest prompt tokens before ours, then the decode worker with the fewest
  sequences, of the same cohort;
- round_robin: of each pool the next one in turn, whatever it has to do; the yardstick for other policies.
When a whole pool is gone the other serves both phases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from engine.types import EngineStats, Role
from router.membership import Member

Policy = Literal["least_work", "round_robin"]


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


def choose(
    loads: Sequence[WorkerLoad], hand_off: bool = True, policy: Policy = "least_work", turn: int = 0
) -> Placement | None:
    """The best placement by the policy, or None if no worker can be reached. Without `hand_off` one worker does all of
    it, a decode worker if there is one: that is where the request is not in the way of prompts. `turn` counts the
    placements so far."""
    usable = [load for load in loads if load.connected]
    pools = [[load for load in usable if load.member.role is role] for role in (Role.PREFILL, Role.DECODE)]
    if policy == "round_robin":
        prefill, decode = (_from_turn(sorted(pool, key=_name), turn) for pool in pools)
    else:
        prefill, decode = sorted(pools[0], key=prefill_work), sorted(pools[1], key=decode_work)
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


def _name(load: WorkerLoad) -> tuple[int, str]:
    """Numbers at the end of ids count as numbers."""
    worker_id = load.member.worker_id
    return len(worker_id), worker_id


def _from_turn(pool: list[WorkerLoad], turn: int) -> list[WorkerLoad]:
    first = turn % len(pool) if pool else 0
    return pool[first:] + pool[:first]
