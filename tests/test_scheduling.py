"""A run whose test processes die: it ends, what killed them has failed, and all else was run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIMIT_S = 120.0  # far more than such a run takes
OPTIONS = "-q -rN -p no:cacheprovider -p xdist.plugin -n 2 --dist loadfile --no-loadscope-reorder"
QUICK = "import pytest\n@pytest.mark.parametrize('number', range(4))\ndef test_quick(number): pass\n"
SINGLE = "def test_single(): pass\n"
FATAL = """
import os, pathlib, resource, subprocess
def test_before(): pass
def test_fatal():
    child = subprocess.Popen(["sleep", "600"])
    pathlib.Path(__file__).with_suffix(".pid").write_text(str(child.pid))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.abort()
def test_after(): pass
"""
FILES = {"quick": QUICK, "single": SINGLE, "fatal": FATAL}


@pytest.mark.parametrize(
    ("files", "num_passed"),
    [
        ("quick quick quick fatal", 14),
        ("fatal quick quick single", 11),
        ("single single fatal single single", 6),
        ("quick fatal fatal", 8),
    ],
)
def test_a_run_outlives_processes_that_die_while_their_children_live(
    tmp_path: Path, files: str, num_passed: int
) -> None:
    (tmp_path / "conftest.py").write_text("from tests.conftest import pytest_xdist_make_scheduler\n")
    kinds = files.split()
    for number, kind in enumerate(kinds):
        (tmp_path / f"test_{number}.py").write_text(FILES[kind])
    command = [sys.executable, "-m", "pytest", *OPTIONS.split(), str(tmp_path)]
    environ = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environ, check=False, capture_output=True, text=True, timeout=LIMIT_S
        )
    finally:
        for file in tmp_path.glob("*.pid"):
            os.kill(int(file.read_text()), signal.SIGKILL)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    assert f"{kinds.count('fatal')} failed, {num_passed} passed" in done.stdout
    assert done.stdout.count("::test_fatal'\n") == kinds.count("fatal"), done.stdout
