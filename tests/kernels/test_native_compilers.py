"""The C++ code for processors that are not the one at hand."""

from __future__ import annotations

import pytest
import torch

from kernels.cpu.native import library as native_library
from tests.kernels.native import native


@pytest.mark.parametrize("march", ["x86-64-v3", "skylake-avx512", "sapphirerapids"])
def test_code_for_other_processors_is_fit_for_a_compiler(march: str) -> None:
    native(torch.float32)  # skips where there is no compiler
    compiler, _ = native_library._compiler()
    for name in native_library._PARTS:
        native_library._run(
            [compiler, *native_library._FLAGS, f"-march={march}", "-fsyntax-only", str(native_library._SOURCES / name)]
        )
