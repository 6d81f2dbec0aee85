"""From what was observed to the profile that a file holds."""

from __future__ import annotations

from cluster.profiling.live import Served
from cluster.profiling.observed import Observed, gateway_s_of, link_of, slowdown_of, token_s_of
from cluster.simulator.service_times.measured import MeasuredTimes
from cluster.simulator.service_times.profile import (
    ProfiledLink,
    ProfiledSlowdown,
    WorkerProfile,
    profiled_steps,
)

MS, GB = 1e3, 1e-9


def profile_of(served: Served, observed: Observed, device: str) -> WorkerProfile:
    """`device`: what it was measured on, in words."""
    link, steps = link_of(observed.probes), profiled_steps(observed.alone)
    slowdown = slowdown_of(observed.beside, MeasuredTimes([step.record for step in steps]))
    return WorkerProfile(
        model=served.model,
        device=device,
        gateway_ms=gateway_s_of(observed.probes, link) * MS,
        token_ms=token_s_of(observed.probes, link) * MS,
        link=ProfiledLink(latency_ms=link.latency_s * MS, gb_per_s=link.bytes_per_s * GB),
        kv_token_bytes=served.kv_token_bytes or None,
        slowdown=ProfiledSlowdown(prefill=slowdown.prefill, decode=slowdown.decode),
        steps=steps,
    )
