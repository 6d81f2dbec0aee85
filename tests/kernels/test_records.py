"""Gather and scatter of block records against their reference: by Triton's interpreter, or on a CUDA device."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from kernels.reference import records as reference

ON_DEVICE = torch.cuda.is_available()
if not ON_DEVICE:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are loaded
pytest.importorskip("triton")
from kernels.triton import records  # noqa: E402
from kernels.triton.records import TILE  # noqa: E402

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(ON_DEVICE, reason="the kernels were loaded for the device")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not ON_DEVICE, reason="no CUDA device here")]),
]
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


def test_every_architecture_that_we_name_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No device is needed: Triton brings its assembler."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from triton.runtime.jit import JITFunction

    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")  # Triton warns of its default; there is nothing to fuse
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = JITFunction(records._copy_records.fn)
    types = {"plane": "*bf16", "block_ids": "*i64", "slot": "*bf16", "TO_SLOT": "constexpr", "TILE": "constexpr"}
    types |= {name: "i32" for name in ("first_layer", "num_ids", "width")} | {"layer_stride": "i64"}
    for capability in (80, 90):
        for to_slot in (True, False):
            constants = {"TO_SLOT": to_slot, "TILE": TILE}
            source = ASTSource(function, {name: types[name] for name in function.arg_names}, constants)
            assert compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
