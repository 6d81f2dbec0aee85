"""WindServe (ISCA 2025, algorithm 1): when the first token is predicted later than a threshold just below its target,
and a decode worker can take the whole prompt into one step within the target of its tokens, it is computed there.

TTFT = sum of the prefills that wait + its own, on the prefill worker with the least; else as DistServe.

Known defects, kept: the threshold is set by hand, and the paper's own figure 5 shows attainment from 40 % to 95 % by it
alone; no cache; a decode worker is tried only once prefill is late already.
"""

from __future__ import annotations

from engine.types import Role
from router.policies.pools import by_decode_work, pair, queue_s
from router.policies.slack import free_tokens, slack_tokens
from router.policies.snapshot import Decision, Placement, Snapshot

THRESHOLD = 0.9  # of the target


def windserve(snapshot: Snapshot) -> Decision | None:
    ask = snapshot.ask
    prefill = sorted(snapshot.pool(Role.PREFILL), key=lambda load: (queue_s(snapshot, load), load.member.worker_id))
    decode = by_decode_work(snapshot)
    if prefill and ask.hand_off:
        chunk = snapshot.limits.prefill_chunk
        own_s = snapshot.predictor.prefill_s(prefill[0].member.pool, ask.num_tokens, 0, chunk)
        if queue_s(snapshot, prefill[0]) + own_s > THRESHOLD * ask.ttft_s:
            for load in decode:
                slots = slack_tokens(snapshot, load, 0, ask.tpot_s)
                if min(slots, free_tokens(snapshot, load)) >= ask.num_tokens:
                    return Placement(load.member, None)
    return pair(snapshot, prefill, decode)
