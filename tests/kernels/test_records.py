"""Gather and scatter of block records against their reference: by Triton's interpreter, or on a CUDA device."""

from __future__ import annotations

import pytest
import torch

from kernels.reference import records as reference
from tests.kernels.interpreted import DEVICES

from kernels.triton import records  # isort: skip
from kernels.triton.records import TILE  # isort: skip

LAYERS, BLOCKS = 4, 7


def plane_of(width: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(width)
    return torch.randn(LAYERS, BLOCKS, width, generator=generator).to(dtype).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 24, TILE - 1, TILE, TILE + 1])
def test_records_are_gathered_and_scattered_as_the_reference_says(width: int, dtype: torch.dtype, device: str) -> None:
    plane, ids = plane_of(width, dtype, device), torch.tensor([5, 0, 6], device=device)
    slot, wanted = (torch.full((2, 3, width), torch.nan, dtype=dtype, device=device) for _ in "ab")
    records.gather_records(plane, 1, ids, slot)
    reference.gather_records(plane, 1, ids, wanted)
    assert torch.equal(slot, wanted)
    target, expected = torch.full_like(plane, -7), torch.full_like(plane, -7)
    records.scatter_records(target, 2, ids, slot)
    reference.scatter_records(expected, 2, ids, slot)
    assert torch.equal(target, expected)
    assert torch.equal(target[2:, ids], slot)
    assert (target[:2] == -7).all(), "other layers stay as they are"


@pytest.mark.parametrize("device", DEVICES)
def test_no_records_are_no_launch(device: str) -> None:
    plane, none = plane_of(8, torch.float32, device), torch.zeros(0, dtype=torch.long, device=device)
    records.gather_records(plane, 0, none, torch.empty(2, 0, 8, device=device))
    records.scatter_records(plane, 0, none, torch.empty(2, 0, 8, device=device))
    assert torch.equal(plane, plane_of(8, torch.float32, device))
