"""Known times: a predictor that knows the service times and links of a simulated cluster, as if it had learnt them all.

What gateways learn from steps would differ with and without bursts, which tell of few of theirs.
"""

from __future__ import annotations

from collections.abc import Callable

from cluster.simulator.network import LinkTimes
from cluster.simulator.service_times.model import ServiceTimes
from engine.step_shape import Chunk, StepShape
from engine.types import Role
from router.membership import Pool


class KnownTimes:
    """Implements router.policies.snapshot.Predictor. `steps`: of the workers of a role."""

    def __init__(self, steps: Callable[[Role], ServiceTimes], links: LinkTimes) -> None:
        self._steps = steps
        self._links = links

    def step_s(self, pool: Pool, shape: StepShape) -> float:
        return self._steps(pool.role).step_s(shape) if shape.chunks or shape.num_decoding else 0.0

    def prefill_s(self, pool: Pool, num_new: int, num_cached: int, chunk: int) -> float:
        starts = range(0, num_new, chunk)
        shapes = (StepShape((Chunk(num_cached + start, min(chunk, num_new - start)),)) for start in starts)
        return sum(map(self._steps(pool.role).step_s, shapes))

    def decode_step_s(self, pool: Pool, num_sequences: int, num_context: int) -> float:
        return self.step_s(pool, StepShape((), num_sequences, num_context))

    def transfer_s(self, source: str, target: str, size_bytes: int) -> float:
        return self._links.latency_s + size_bytes / self._links.bytes_per_s
