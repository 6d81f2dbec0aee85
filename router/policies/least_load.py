"""Least load: the prefill worker with the fewest prompt tokens before ours, then the decode worker with the fewest
sequences, of the same cohort. Knows neither caches nor targets."""

from __future__ import annotations

from router.policies.pools import by_decode_work, by_prefill_work, pair
from router.policies.snapshot import Decision, Snapshot


def least_load(snapshot: Snapshot) -> Decision | None:
    return pair(snapshot, by_prefill_work(snapshot), by_decode_work(snapshot))
