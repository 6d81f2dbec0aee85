"""Known times: a predictor that knows the service times and links of a simulated cluster, as if it had learnt them."""

from __future__ import annotations

from cluster.simulator.network import LinkTimes
from cluster.simulator.service_times.model import ServiceTimes
from engine.step_shape import Chunk, StepShape
from router.membership import Pool


class KnownTimes:
    """Implements router.policies.snapshot.Predictor, for any pool."""

    def __init__(self, steps: ServiceTimes, links: LinkTimes) -> None:
        self._steps = steps
        self._links = links

    def step_s(self, pool: Pool, shape: StepShape) -> float:
        return self._steps.step_s(shape)

    def prefill_s(self, pool: Pool, num_new: int, num_cached: int, chunk: int) -> float:
        starts = range(0, num_new, chunk)
        shapes = (StepShape((Chunk(num_cached + start, min(chunk, num_new - start)),)) for start in starts)
        return sum(map(self._steps.step_s, shapes))

    def decode_step_s(self, pool: Pool, num_sequences: int, num_context: int) -> float:
        return self._steps.step_s(StepShape((), num_sequences, num_context))

    def transfer_s(self, source: str, target: str, size_bytes: int) -> float:
        return self._links.latency_s + size_bytes / self._links.bytes_per_s
