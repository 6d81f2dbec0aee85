"""All kernels become machine code for the devices that we name, which needs none of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_every_kernel_compiles_for_every_device_and_spills_nothing(tmp_path: Path) -> None:
    """In a process of its own, where kernels are not interpreted."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.kernel_code", "--quick", "--json", str(tmp_path / "code.json")]
    done = subprocess.run(
        command, env=env | {"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "code.json").read_text())
    assert all(target["met"] for target in told["targets"]), done.stdout
    kernels = {row["kernel"] for row in told["rows"]}
    assert kernels == {
        "_add_rms_norm", "_turn_and_store", "_attend", "_merge", "_gate_and_mul", "_multiply", "_copy_records",
        "_best_of_tile", "_pick", "_group", "_multiply_by_expert", "_add_up",
    }  # fmt: skip
    assert {row["sm"] for row in told["rows"]} == {80, 90}
