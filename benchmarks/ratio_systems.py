"""The systems that benchmarks/ratio.py compares: a routing policy, a way to keep the ratio, and what a change costs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from cluster.control.controller import Decide
from cluster.control.rivals.arrow import Arrow
from cluster.control.rivals.distserve import DistServe
from cluster.control.rivals.dopd import Dopd
from cluster.control.rivals.dynamo import DynamoLoad, DynamoSla
from cluster.control.rivals.packing import Packing
from router.policies import PolicyName

START_S = 35.0  # a worker's start: DOPD names up to 30 s for prefill and half as much again for decode
RELOAD_S = 60.0  # DistServe's replan loads weights anew


@dataclass(frozen=True, slots=True)
class System:
    """`make` with `constants` makes what decides; without it the split stays. `grid`: of constants that are searched on
    the first third of a load. `start_s`: how long a worker is away that changes its pool; 0: roles are labels."""

    name: str
    policy: PolicyName = "slo"
    make: Callable[..., Decide] | None = None
    grid: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    constants: Mapping[str, float] = field(default_factory=dict)
    start_s: float = 0.0
    num_prefill: int = 0  # at the start; 0: half of all
    is_ours: bool = False

    @property
    def rival(self) -> Callable[[], Decide] | None:
        return None if self.make is None else partial(self.make, **self.constants)


SYSTEMS = (
    System("ours", is_ours=True),
    System("aggregated", "colocated"),
    System("DistServe replan", "distserve", DistServe, {"interval_s": (30.0, 60.0, 120.0)}, start_s=RELOAD_S),
    System(
        "Dynamo load", "prefix_aware", DynamoLoad,
        {"interval_s": (5.0, 20.0), "kv_down": (0.3, 0.5), "queue_up": (1.0, 5.0)}, start_s=START_S,
    ),
    System("Dynamo SLA", "prefix_aware", DynamoSla, {"interval_s": (30.0, 60.0, 180.0)}, start_s=START_S),
    System("DOPD as released", "dopd_buckets", Dopd, {"interval_s": (20.0, 60.0, 180.0)}, start_s=START_S),
    System(
        "DOPD corrected", "dopd_buckets", partial(Dopd, corrected=True),
        {"interval_s": (20.0, 60.0), "busy": (0.6, 0.8)}, start_s=START_S,
    ),
    System("WindServe dispatch", "windserve"),
    System("Arrow", "least_load", Arrow, {"expand": (0.7, 1.0), "shrink": (0.3, 0.5)}),
    System("packing", "least_load", Packing, {"full": (0.6, 0.8), "queued": (1.0, 3.0)}),
)  # fmt: skip


def searched(system: System) -> list[System]:
    """With each choice of its constants."""
    names = list(system.grid)
    return [
        replace(system, constants=dict(zip(names, values, strict=True)))
        for values in itertools.product(*system.grid.values())
    ]
