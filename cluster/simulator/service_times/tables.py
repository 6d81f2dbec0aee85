"""What a file of service times holds: tables by name and tensor-parallel size, each made when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cluster.simulator.service_times.model import ServiceTimes

ONLY = None  # the size of a table that knows nothing of sizes

Tables = Mapping[str, Mapping[int | None, Callable[[], ServiceTimes]]]
