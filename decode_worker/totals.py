"""What the pulls of a worker add up to, for metrics."""

from __future__ import annotations

from dataclasses import dataclass, replace

from engine.types import CarrierTotals
from kv_transfer.pull import Pulled


@dataclass(frozen=True, slots=True)
class TransferTotals:
    """Sums over finished pulls, for metrics."""

    num_pulls: int = 0
    num_failed: int = 0
    num_resumes: int = 0
    size_bytes: int = 0
    duration_s: float = 0.0
    saved_bytes: int = 0  # of blocks that were here already
    carriers: tuple[CarrierTotals, ...] = ()

    def with_pull(self, pulled: Pulled, duration_s: float) -> TransferTotals:
        """After one more that was finished."""
        by_name = {one.carrier: one for one in self.carriers}
        one = by_name.get(pulled.carrier, CarrierTotals(pulled.carrier))
        by_name[pulled.carrier] = replace(
            one, num_pulls=one.num_pulls + 1, size_bytes=one.size_bytes + pulled.size_bytes,
            duration_s=one.duration_s + duration_s, saved_bytes=one.saved_bytes + pulled.saved_bytes,
            hidden_bytes=one.hidden_bytes + pulled.hidden_bytes,
        )  # fmt: skip
        return replace(
            self, num_pulls=self.num_pulls + 1, num_resumes=self.num_resumes + pulled.num_resumes,
            size_bytes=self.size_bytes + pulled.size_bytes, duration_s=self.duration_s + duration_s,
            saved_bytes=self.saved_bytes + pulled.saved_bytes, carriers=tuple(by_name.values()),
        )  # fmt: skip
