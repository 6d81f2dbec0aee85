"""DistServe (OSDI 2024, section 4.3): first come, first served; the prefill worker with the shortest queue, then the
least loaded decode worker, which pulls.

Known defects, kept: a queue's length counts prompts whatever their lengths; no targets in the decision, no admission,
no cache.
"""

from __future__ import annotations

from engine.types import Role
from router.policies.pools import by_decode_work, pair
from router.policies.snapshot import Decision, Snapshot, WorkerLoad


def distserve(snapshot: Snapshot) -> Decision | None:
    def queue(load: WorkerLoad) -> tuple[int, str]:
        return len(load.prompts.dues), load.member.worker_id

    return pair(snapshot, sorted(snapshot.pool(Role.PREFILL), key=queue), by_decode_work(snapshot))
