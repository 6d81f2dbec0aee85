"""What every model of service times can say. Pure functions of a step's shape, in seconds."""

from __future__ import annotations

from typing import Protocol

from engine.step_shape import StepShape


class ServiceTimes(Protocol):
    def step_s(self, shape: StepShape) -> float: ...

    def extrapolates(self, shape: StepShape) -> bool:
        """Is this beyond what was measured? Reports say how many steps were."""
        ...
