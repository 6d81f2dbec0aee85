"""What every model of service times can say. Pure functions of a step's shape, in seconds."""

from __future__ import annotations

from typing import Protocol

from engine.step_shape import StepShape


class ServiceTimes(Protocol):
    def step_s(self, shape: StepShape) -> float: ...

    def decode_steps_s(self, num_decoding: int, num_context: int, num_steps: int) -> list[float]:
        """Durations of so many successive steps that only decode, of the same sequences: each step, every sequence
        reads one position more. `num_context`: of the first step. Equal to `step_s` of each, bit for bit."""
        ...

    def extrapolates(self, shape: StepShape) -> bool:
        """Is this beyond what was measured? Reports say how many steps were."""
        ...


def contexts_of(num_decoding: int, num_context: int, num_steps: int) -> range:
    """`num_context` of each of the steps of `decode_steps_s`; num_decoding at least 1."""
    return range(num_context, num_context + num_decoding * num_steps, num_decoding)
