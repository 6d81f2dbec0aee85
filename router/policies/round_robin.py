"""Round robin: of each pool the next one in turn, whatever it has to do. The yardstick for other policies."""

from __future__ import annotations

from engine.types import Role
from router.policies.pools import pair
from router.policies.snapshot import Decision, Snapshot, WorkerLoad


def round_robin(snapshot: Snapshot) -> Decision | None:
    prefill, decode = (_from_turn(snapshot, role) for role in (Role.PREFILL, Role.DECODE))
    return pair(snapshot, prefill, decode)


def _from_turn(snapshot: Snapshot, role: Role) -> list[WorkerLoad]:
    pool = sorted(snapshot.pool(role), key=_by_number)
    first = snapshot.memory.turn % len(pool) if pool else 0
    return pool[first:] + pool[:first]


def _by_number(load: WorkerLoad) -> tuple[int, str]:
    """Numbers at the end of ids count as numbers."""
    return len(load.member.worker_id), load.member.worker_id
