"""First guesses of what a worker serves, from its service times alone: where the search for the highest rate begins."""

from __future__ import annotations

from cluster.simulator.service_times.model import ServiceTimes
from cluster.simulator.workloads.workload import Workload
from engine.step_shape import Chunk, StepShape


def prefill_rate(steps: ServiceTimes, workload: Workload) -> float:
    """Of prompts of the mean length, one after the other."""
    return 1 / steps.step_s(StepShape((Chunk(0, max(1, round(_mean_prompt(workload)))),)))


def decode_rate(steps: ServiceTimes, kv_tokens: int, workload: Workload, max_batch_seqs: int, limit_s: float) -> float:
    """Of sequences of the mean length: as many at a time as have room, and as keep a step within the limit."""
    prompt, output = _mean_prompt(workload), _mean_output(workload)
    context = round(prompt + output / 2)

    def step_s(num_decoding: int) -> float:
        return steps.step_s(StepShape((), num_decoding, num_decoding * context))

    least, most = 1, max(1, min(max_batch_seqs, int(kv_tokens / (prompt + output))))
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if step_s(middle) <= limit_s else (least, middle - 1)
    return least / (step_s(least) * output)


def _mean_prompt(workload: Workload) -> float:
    return sum(arrival.num_prompt for arrival in workload.arrivals) / len(workload.arrivals)


def _mean_output(workload: Workload) -> float:
    return sum(arrival.num_output for arrival in workload.arrivals) / len(workload.arrivals)
