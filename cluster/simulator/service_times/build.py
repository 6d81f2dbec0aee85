"""Makes service times of measurements of one model on one device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from cluster.simulator.service_times.decode_table import DecodeTable
from cluster.simulator.service_times.phases import PhaseTimes
from cluster.simulator.service_times.prefill_table import PrefillTable
from engine.errors import ConfigError

PREFILL = "prefill"


@dataclass(frozen=True, slots=True)
class Measurement:
    """Of a step of one phase. `tokens`: of each of the prompts, or positions that each of the sequences reads."""

    phase: str
    batch_size: int
    tokens: float
    seconds: float

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.tokens < 1:
            raise ValueError(f"expected at least one sequence of one token, got {self.batch_size} of {self.tokens:g}")


def times_of(name: str, measured: Iterable[Measurement]) -> PhaseTimes:
    """`name` is for errors."""
    listed = list(measured)
    prompts: dict[float, list[float]] = {}
    for one in listed:
        if one.phase == PREFILL and one.batch_size == 1:
            prompts.setdefault(one.tokens, []).append(one.seconds)
    if len(prompts) < 2:
        raise ConfigError(f"{name}: expected prefill times of at least two lengths at batch size 1, got {len(prompts)}")
    points = [(one.batch_size, one.tokens, one.seconds) for one in listed if one.phase != PREFILL]
    if not points:
        raise ConfigError(f"{name}: expected decode times, got none")
    lengths = sorted(prompts)
    prefill = PrefillTable(lengths, [median(prompts[length]) for length in lengths])
    return PhaseTimes(prefill, DecodeTable(points, rows_are_batches=True))
