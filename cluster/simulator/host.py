"""A host that workers share: while several of them compute, each one's step takes longer.

1. a step brings the time that it would take alone;
2. whenever another one begins or ends, all that are under way go on at the pace of their new company;
3. it ends when its work is done, and tells how long that took.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from engine.step_shape import StepShape


@dataclass(frozen=True, slots=True)
class Slowdown:
    """How many times as long a step takes while another worker of its host computes; each further one adds as much."""

    prefill: float = 1.0  # of steps with chunks of prompts
    decode: float = 1.0  # of those that only decode

    def of(self, shape: StepShape, num_others: int) -> float:
        beside_one = self.prefill if shape.chunks else self.decode
        return 1.0 + (beside_one - 1.0) * num_others


class Host:
    def __init__(self, slowdown: Slowdown) -> None:
        self._slowdown = slowdown
        self._num_computing = 0
        self._changed = asyncio.Event()  # replaced at every change of the number

    async def compute(self, shape: StepShape, alone_s: float) -> float:
        """Returns when the step is done, with the time that it took."""
        loop = asyncio.get_running_loop()
        begun, left_s = loop.time(), alone_s
        self._change(1)
        try:
            while left_s > 0.0:
                since, factor = loop.time(), self._slowdown.of(shape, self._num_computing - 1)
                undisturbed = await self._sleep_undisturbed(left_s * factor)
                left_s = 0.0 if undisturbed else left_s - (loop.time() - since) / factor
        finally:
            self._change(-1)
        return loop.time() - begun

    async def _sleep_undisturbed(self, duration_s: float) -> bool:
        """False when the number of those that compute changes before."""
        try:
            async with asyncio.timeout(duration_s):
                await self._changed.wait()
            return False
        except TimeoutError:
            return True

    def _change(self, by: int) -> None:
        self._num_computing += by
        self._changed.set()
        self._changed = asyncio.Event()
