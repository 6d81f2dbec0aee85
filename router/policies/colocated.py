"""Colocated: every worker serves both phases, whatever its role, with chunked prefill and without transfers.

A request goes to the worker with the fewest sequences. What disaggregation has to beat on equal devices (Sarathi-Serve,
OSDI 2024)."""

from __future__ import annotations

from router.policies.pools import decode_work
from router.policies.snapshot import Decision, Placement, Snapshot


def colocated(snapshot: Snapshot) -> Decision | None:
    reached = [load for load in snapshot.loads if load.connected]
    least = min(reached, key=decode_work, default=None)
    return None if least is None else Placement(least.member, None)
