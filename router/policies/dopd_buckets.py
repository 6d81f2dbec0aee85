"""DOPD's length buckets (arXiv 2511.20982, its request scheduler): the mean prompt of late is the one boundary. Longer
ones go alone, to the worker with the least work; shorter ones are gathered on one worker until their batch is full;
ultra-short ones are computed where they decode, while prefill's queue is short (its conditional disaggregation).

A batch is what a step of the worker's engine holds. The engine takes what has come by when it is free, which is the
paper's longest wait, and needs no clock here.

Known defects, kept: one boundary for all; no targets, no admission; local prefill looks at lengths, not at decode's
slack. The paper's optional knapsack is not in its released code, nor here.
"""

from __future__ import annotations

from router.policies.pools import by_decode_work, by_prefill_work, pair
from router.policies.snapshot import Decision, Placement, Snapshot

MAX_LOCAL_PREFILL = 511  # tokens: configs/disagg_planner.yaml of its code
MAX_PREFILL_QUEUE = 8


def dopd_buckets(snapshot: Snapshot) -> Decision | None:
    ask, memory = snapshot.ask, snapshot.memory
    prefill, decode = by_prefill_work(snapshot), by_decode_work(snapshot)
    num_queued = sum(len(load.prompts.dues) for load in prefill)
    if decode and ask.hand_off:
        num_new = ask.num_tokens - snapshot.cached_on(decode[0])
        if num_new <= MAX_LOCAL_PREFILL and num_queued < MAX_PREFILL_QUEUE * len(prefill):
            return Placement(decode[0].member, None)
    if ask.num_tokens <= memory.mean_prompt:
        batch = next((load for load in prefill if load.name == memory.short_batch), None)
        if batch is not None and batch.num_prompt_tokens + ask.num_tokens <= snapshot.limits.max_batch_tokens:
            prefill = [batch, *(load for load in prefill if load is not batch)]
    return pair(snapshot, prefill, decode)
