"""The benchmarks for GPUs run to their end without one, on small shapes: what they time is checked, no figure is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.device_model import TARGETS, promised

pytest.importorskip("triton")
BENCHMARKS = ("gpu_attention", "gpu_engine")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_it_is_right_by_the_interpreter(name: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--interpreted", "--json", str(file)]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(file.read_text())
    assert told["rows"] and "no figures" in told["machine"]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_targets_are_read_as_yaml_reads_them(name: str) -> None:
    wanted = yaml.safe_load(TARGETS.read_text())[name]
    assert promised(name) == {target: bound["least"] for target, bound in wanted.items()}
