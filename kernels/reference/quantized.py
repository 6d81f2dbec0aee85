"""Weights as whole numbers: 8 bits with a scale for each row, or 4 bits with a scale and a shift for groups of a row.

What is kept of a weight follows from the weight alone, no data is looked at. 8 bits are the nearest numbers. With 4
bits a group's range is cut evenly first; then scale and shift are fitted to the numbers by least squares, and numbers
chosen again, in turns (Lloyd, "Least squares quantization in PCM", 1982, with evenly spaced levels). `python -m
benchmarks.quantizers` shows what is lost.

Groups of 32 with a scale and a shift in float16 are what GGUF's Q4_1 has, so a model that comes from Q4_1 loses next to
nothing again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Bits = Literal[16, 8, 4]  # 16: as the weight is

GROUP = 32  # weights of a row that share a scale and a shift, with 4 bits
_HIGHEST = 127
_LOWEST_NIBBLE, _HIGHEST_NIBBLE = -8, 7
_STEPS = 15  # between the 16 levels
_TURNS = 3  # of fitting: of Gaussian weights 4, 6 and 7 % less error; a fourth gives less than 0.5 %
_CHUNK_ROWS = 128  # of a weight that are worked on together: they stay in the second-level cache


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
    parts = [_fitted(part.view(len(part), -1, GROUP)) for part in weight.split(_CHUNK_ROWS)]
    numbers, scales, shifts = (torch.cat(found) for found in zip(*parts, strict=True))
    return Quantized(numbers.view(weight.shape), scales, shifts)


def _fitted(grouped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """grouped: [rows, num_groups, GROUP]. Numbers, scales, shifts: [rows, num_groups]."""
    lowest, highest = grouped.amin(dim=2), grouped.amax(dim=2)
    scales = _as_half((highest - lowest) / _STEPS)
    shifts = _as_half(lowest - _LOWEST_NIBBLE * scales)
    numbers = _nearest(grouped, scales, shifts)
    means = grouped.mean(dim=2)
    for _ in range(_TURNS):
        number_means = numbers.mean(dim=2)
        around = numbers - number_means[..., None]
        squares = around.square().sum(dim=2)
        scales = _as_half(torch.where(squares > 0, (around * grouped).sum(dim=2) / squares, 0))
        shifts = _as_half(means - scales * number_means)
        numbers = _nearest(grouped, scales, shifts)
    return numbers.to(torch.int8), scales, shifts


def _nearest(grouped: torch.Tensor, scales: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    inverse = torch.where(scales > 0, 1 / scales, 0)
    return ((grouped - shifts[..., None]) * inverse[..., None]).round_().clamp_(_LOWEST_NIBBLE, _HIGHEST_NIBBLE)


def _as_half(values: torch.Tensor) -> torch.Tensor:
    """As float16 keeps them."""
    return values.half().float()
