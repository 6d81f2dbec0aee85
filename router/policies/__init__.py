"""Policies: which workers serve a request, and whether. Each is a pure function from a snapshot to a decision."""

from __future__ import annotations

from typing import Literal

from router.policies.colocated import colocated
from router.policies.distserve import distserve
from router.policies.dopd_buckets import dopd_buckets
from router.policies.least_load import least_load
from router.policies.llmd_threshold import llmd_threshold
from router.policies.mooncake import mooncake
from router.policies.prefix_aware import prefix_aware
from router.policies.round_robin import round_robin
from router.policies.slo import slo
from router.policies.snapshot import Policy
from router.policies.windserve import windserve

PolicyName = Literal[
    "round_robin", "least_load", "prefix_aware", "distserve", "mooncake", "windserve", "dopd_buckets",
    "llmd_threshold", "colocated", "slo",
]  # fmt: skip

POLICIES: dict[PolicyName, Policy] = {
    "round_robin": round_robin,
    "least_load": least_load,
    "prefix_aware": prefix_aware,
    "distserve": distserve,
    "mooncake": mooncake,
    "windserve": windserve,
    "dopd_buckets": dopd_buckets,
    "llmd_threshold": llmd_threshold,
    "colocated": colocated,
    "slo": slo,
}
