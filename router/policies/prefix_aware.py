"""Prefix-aware: where most of the prompt is cached, unless many requests are there already.

AIBrix's `prefix_cache` score (vllm-project/aibrix, pd_disaggregation.go): (100 - matched %) * 0.1 + requests / most
requests, the least wins; a worker with more requests than the mean and a standard deviation is left out. Decode is the
least loaded.

Known defects, kept: counts requests and not their lengths, so one long prompt weighs as much as a short one; the
weight of the cache is a constant.
"""

from __future__ import annotations

from statistics import fmean, pstdev

from router.policies.pools import by_decode_work, by_prefill_work, pair
from router.policies.snapshot import Decision, Snapshot, WorkerLoad


def prefix_aware(snapshot: Snapshot) -> Decision | None:
    prefill = by_prefill_work(snapshot)
    counts = [load.num_sequences for load in prefill]
    most = max(counts, default=0) or 1
    limit = fmean(counts) + pstdev(counts) if counts else 0.0

    def score(load: WorkerLoad) -> tuple[bool, float]:
        matched = snapshot.cached_on(load) / snapshot.ask.num_tokens
        return load.num_sequences > limit, 100 * (1 - matched) * 0.1 + load.num_sequences / most

    return pair(snapshot, sorted(prefill, key=score), by_decode_work(snapshot))
