"""Weights as whole numbers: 8 bits with a scale for each row, or 4 bits with a scale and a shift for groups of a row.

Round to nearest: what is kept of a weight follows from the weight alone, no data is looked at. Groups of 32 with a
scale and a shift in float16 are what GGUF's Q4_1 has, so a model that comes from Q4_1 loses next to nothing again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Bits = Literal[16, 8, 4]  # 16: as the weight is

GROUP = 32  # weights of a row that share a scale and a shift, with 4 bits
_HIGHEST = 127
_LEVELS = 15


@dataclass(frozen=True, slots=True)
class Quantized:
    """weight = numbers * scales + shifts, group by group of a row.

    numbers: [out, in] int8: -127 to 127 with 8 bits, -8 to 7 with 4
    scales, shifts: [out, num_groups] float32; no shifts with 8 bits, whose rows are one group
    """

    numbers: torch.Tensor
    scales: torch.Tensor
    shifts: torch.Tensor | None

    def restored(self) -> torch.Tensor:
        """[out, in] float32."""
        rows, num_groups = self.scales.shape
        grouped = self.numbers.float().view(rows, num_groups, -1) * self.scales[..., None]
        if self.shifts is not None:
            grouped = grouped + self.shifts[..., None]
        return grouped.view(self.numbers.shape)


def quantize(weight: torch.Tensor, bits: Bits) -> Quantized | None:
    """weight: [out, in]. None: as it is. Rows that are no whole groups get 8 bits instead of 4."""
    if bits == 16:
        return None
    if bits == 8 or weight.shape[1] % GROUP:
        return _by_row(weight.float())
    return _by_group(weight.float())


def _by_row(weight: torch.Tensor) -> Quantized:
    scales = weight.abs().amax(dim=1, keepdim=True) / _HIGHEST
    numbers = torch.where(scales > 0, weight / scales, 0).round().clamp(-_HIGHEST, _HIGHEST)
    return Quantized(numbers.to(torch.int8), scales, None)


def _by_group(weight: torch.Tensor) -> Quantized:
    grouped = weight.view(len(weight), -1, GROUP)
    lowest, highest = grouped.amin(dim=2), grouped.amax(dim=2)
    scales = ((highest - lowest) / _LEVELS).half().float()
    shifts = (lowest + 8 * scales).half().float()
    numbers = torch.where(scales[..., None] > 0, (grouped - shifts[..., None]) / scales[..., None], 0)
    return Quantized(numbers.round().clamp(-8, 7).to(torch.int8).view(weight.shape), scales, shifts)
