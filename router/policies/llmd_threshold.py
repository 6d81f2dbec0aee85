"""llm-d's prefix-based decider (llm-d/llm-d-router): the decode worker is chosen first, by cache and load alike; the
prompt is computed elsewhere if at least so many of its tokens are not cached there.

Known defects, kept: a static threshold that looks at the cache and never at load or link; no admission but of what can
be shed.
"""

from __future__ import annotations

from router.policies.pools import by_decode_work, by_prefill_work, num_sequences, pair
from router.policies.snapshot import Decision, Placement, Snapshot, WorkerLoad

NON_CACHED_TOKENS = 512


def llmd_threshold(snapshot: Snapshot) -> Decision | None:
    decode = by_decode_work(snapshot)
    most = max(map(num_sequences, decode), default=0) or 1

    def score(load: WorkerLoad) -> float:
        return num_sequences(load) / most - snapshot.cached_on(load) / snapshot.ask.num_tokens

    decode.sort(key=score)
    placement = pair(snapshot, by_prefill_work(snapshot), decode)
    if placement is None or placement.decode is None:
        return placement
    load = next(load for load in decode if load.member == placement.decode)
    if snapshot.ask.num_tokens - snapshot.cached_on(load) < NON_CACHED_TOKENS:
        return Placement(placement.decode, None)
    return placement
