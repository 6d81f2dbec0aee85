"""Calibration of a modelled engine: the probes of engine/calibration.py, as long as the modelled times say."""

from __future__ import annotations

import math

from cluster.simulator.service_times.model import ServiceTimes
from engine.calibration import calibrate
from engine.engine import EngineSpec
from engine.layer_groups import LayersStored
from engine.scheduler import Batch
from engine.step_shape import StepRecord
from engine.types import Sampled


def modelled_calibration(spec: EngineSpec, times: ServiceTimes) -> tuple[StepRecord, ...]:
    """Of every probe that fits; no time passes."""
    model = _Timed(times)
    return calibrate(spec, model, math.inf, model.clock)


class _Timed:
    """A ModelRunner whose steps move a clock of its own."""

    def __init__(self, times: ServiceTimes) -> None:
        self._times = times
        self._now_s = 0.0

    def clock(self) -> float:
        return self._now_s

    def execute(self, batch: Batch, stored: LayersStored | None = None) -> list[Sampled]:
        self._now_s += self._times.step_s(batch.shape)
        return [Sampled((0,)) if item.samples else Sampled() for item in batch.scheduled]
