"""Weights as whole numbers: what is kept of them, and that an engine is told from one with others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from engine.build import build_engine
from engine.config import EngineConfig, ModelSource, Quantization
from engine.setup import EngineSetup, plan_engine
from kernels.reference.quantized import GROUP, Bits, quantize
from tests.engine.tiny import request, run


def setup_of(folder: Path, quantization: Quantization) -> EngineSetup:
    config = EngineConfig(num_blocks=64, block_size=4, prefill_chunk=16, max_batch_tokens=32)
    source = ModelSource(name=str(folder), dtype="bfloat16", quantization=quantization)
    return plan_engine(source, config, hash_key=b"key")


def test_whole_numbers_are_for_bfloat16() -> None:
    with pytest.raises(ValidationError, match="quantization int8 needs dtype bfloat16"):
        ModelSource(quantization="int8")


def test_an_engine_runs_with_them_and_is_of_another_cohort(tiny_llama: Callable[..., tuple[object, Path]]) -> None:
    _, folder = tiny_llama()
    setups = [setup_of(folder, name) for name in ("none", "int8", "int4")]
    assert len({setup.cohort for setup in setups}) == 3
    for setup in setups:
        built = build_engine(setup, None)
        tokens = run(built.engine, built.runner, [request("a", range(3, 30), max_tokens=8, ignore_eos=True)])
        assert [len(found) for found in tokens.values()] == [8]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("bits", "most"), [(8, 0.012), (4, 0.075)])
def test_of_gaussian_weights_little_is_lost(bits: Bits, most: float) -> None:
    """Relative error of the whole matrix. Levels that cut a group's range evenly lose 0.078 of it with 4 bits."""
    weight = random(64, 512)
    quantized = quantize(weight, bits)
    assert quantized is not None
    assert 0 < (quantized.restored() - weight).norm() / weight.norm() < most


def test_a_weight_that_comes_from_q4_1_is_kept_exactly() -> None:
    """GGUF's Q4_1 has groups of 32 with a scale and a lowest value in float16, whose bits 16 levels span."""
    numbers = torch.randint(0, 16, (8, 4, GROUP), generator=torch.Generator().manual_seed(0))
    numbers[..., 0], numbers[..., 1] = 0, 15
    scale = torch.tensor(0.0625)
    weight = (numbers * scale - 0.5).view(8, -1)
    quantized = quantize(weight, 4)
    assert quantized is not None
    assert torch.equal(quantized.restored(), weight)


def test_rows_are_quantised_alone() -> None:
    """However many there are: they are worked on in chunks."""
    weight = random(300, GROUP)
    quantized, last = quantize(weight, 4), quantize(weight[-1:], 4)
    assert quantized is not None and last is not None
    assert torch.equal(quantized.restored()[-1:], last.restored())


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_zeros_and_of_one_value_stay_what_they_are(bits: Bits) -> None:
    weight = torch.cat((torch.zeros(1, 64), torch.full((1, 64), 0.5)))
    quantized = quantize(weight, bits)
    assert quantized is not None
    torch.testing.assert_close(quantized.restored(), weight, rtol=1e-3, atol=0)


def test_rows_that_are_no_whole_groups_get_eight_bits() -> None:
    quantized = quantize(random(4, GROUP + 2), 4)
    assert quantized is not None and quantized.shifts is None
