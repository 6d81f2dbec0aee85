"""What rivals share: pools as they are, and the step towards a split that one wants."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.control.planner import Flip, Plan
from cluster.control.seen import Seen
from cluster.control.sizing import Machine
from engine.types import Role
from router.report import StepTable, WorkerStand


def pool(seen: Seen, role: Role) -> list[WorkerStand]:
    return [worker for worker in seen.workers if worker.role is role]


def machine_of(seen: Seen) -> Machine | None:
    return seen.machine(seen.workers[0].cohort) if seen.workers else None


def within(num_prefill: float, num_decode: float, num_workers: int) -> int:
    """Prefill workers of a split that wants so many of each, at the same ratio if there are not so many."""
    total = num_prefill + num_decode
    share = num_prefill / total if total > 0 else 0.5
    return min(num_workers - 1, max(1, round(share * num_workers)))


def towards(seen: Seen, num_prefill: int, why: str) -> Plan:
    """One worker less in the pool that has too many: the one with least to do."""
    prefill, decode = pool(seen, Role.PREFILL), pool(seen, Role.DECODE)
    if seen.is_flipping or num_prefill == len(prefill) or seen.num_workers < 2:
        return Plan(f"hold: {why}")
    to = Role.PREFILL if num_prefill > len(prefill) else Role.DECODE
    givers = decode if to is Role.PREFILL else prefill
    if len(givers) < 2:
        return Plan(f"hold: {why}")
    return Plan(f"flip: {why}", flip_of(min(givers, key=burden), to))


def burden(worker: WorkerStand) -> tuple[float, float, str]:
    return worker.num_tokens, worker.queued_s, worker.worker_id


def flip_of(worker: WorkerStand, to: Role) -> Flip:
    return Flip(worker.worker_id, worker.incarnation, to, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Means:
    """Of requests in a window: what controllers that size on means go by."""

    rate: float
    num_prompt: float
    num_output: float
    compute_s: float
    tpot_s: float  # target
    ttft_s: float


def means(seen: Seen, span_s: float, *, at_their_end: bool = False) -> Means | None:
    """`at_their_end`: their rate is that at which requests end, which under load is what is served already (Dynamo's
    issue 8861)."""
    arrived = seen.sample(span_s)
    if not arrived:
        return None
    count = len(arrived)
    span_s = max(1.0, min(span_s, seen.now - seen.arrived[0].at))
    num = seen.num_arrived(span_s)
    if at_their_end:
        num = sum(not one.refused for one in seen.fared_since(span_s))
    return Means(
        num / span_s,
        sum(one.num_prompt for one in arrived) / count,
        max(1.0, sum(one.num_output for one in arrived) / count),
        sum(one.compute_s for one in arrived) / count,
        min(one.tpot_s for one in arrived),
        min(one.ttft_s for one in arrived),
    )


def step_s(table: StepTable, size: float, context: float) -> float:
    """Of so many sequences with so many positions each; nearest entries of the table, linear between sizes."""
    column = min(range(len(table.contexts)), key=lambda index: abs(table.contexts[index] - context))
    sizes, times = table.sequences, [row[column] for row in table.step_s]
    for low in range(len(sizes) - 1):
        if size <= sizes[low + 1]:
            part = max(0.0, size - sizes[low]) / (sizes[low + 1] - sizes[low])
            return times[low] + part * (times[low + 1] - times[low])
    return times[-1]


def largest_batch(machine: Machine, context: float, limit_s: float) -> float:
    """Sequences of which a step keeps the limit; at least 1."""
    least, most = 1, machine.max_batch_seqs
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if step_s(machine.steps, middle, context) <= limit_s else (least, middle - 1)
    return float(least)
