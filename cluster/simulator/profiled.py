"""The simulated cluster of a profile: its steps, its link, what its workers do to each other, and its gateway."""

from __future__ import annotations

from dataclasses import replace

from cluster.simulator.host import Slowdown
from cluster.simulator.network import LinkTimes
from cluster.simulator.service_times.measured import MeasuredTimes
from cluster.simulator.service_times.profile import WorkerProfile
from cluster.simulator.spec import WorldSpec


def profiled_world(spec: WorldSpec, profile: WorkerProfile, one_host: bool) -> WorldSpec:
    """`spec` with the times of a profile. `one_host`: all workers share one, as those did that were measured."""
    link, slowdown = profile.link, profile.slowdown
    return replace(
        spec,
        steps=MeasuredTimes([step.record for step in profile.steps]),
        links=LinkTimes(link.latency_ms / 1e3, link.gb_per_s * 1e9),
        kv_token_bytes=profile.kv_token_bytes or spec.kv_token_bytes,
        slowdown=Slowdown(slowdown.prefill, slowdown.decode) if one_host else None,
        gateway_s=profile.gateway_ms / 1e3,
        token_s=profile.token_ms / 1e3,
    )
