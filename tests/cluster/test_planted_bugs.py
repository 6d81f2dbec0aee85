"""Fault runs find the bugs that are planted, and nothing else. 2,000 of them: `python -m benchmarks.faults`."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.planted_bugs import PLANTED
from cluster.simulator.faults.case import load_case
from cluster.simulator.faults.cases import Cases
from cluster.simulator.faults.cli import app
from cluster.simulator.faults.run import run_case

# Where a run that finds each is near. Another schedule moves it: then a few more are tried, or look for a new one by
# python -m cluster.simulator.faults --bug benchmarks.planted_bugs:NAME
NEAR = {
    "skipped_epoch_fence": 0, "double_free": 0, "lost_release": 7, "reordered_token": 145, "ignored_deadline": 8,
    "leaked_reservation": 8, "early_free": 0, "endless_lease": 20, "unverified_frame": 20, "dropped_abort": 7,
}  # fmt: skip
MOST_TRIES = 40
NUM_CLEAN_RUNS = 60


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(bug: str) -> None:
    cases = Cases()
    for seed in range(NEAR[bug], NEAR[bug] + MOST_TRIES):
        case = cases.of(seed)
        with PLANTED[bug]():
            violation = run_case(case).violation
        if violation is not None:
            assert run_case(case).violation is None, "without the bug the same case keeps every promise"
            return
    pytest.fail(f"{MOST_TRIES} runs did not find it")


def test_nothing_is_found_where_nothing_is_planted() -> None:
    cases = Cases()
    assert [run_case(cases.of(seed)).violation for seed in range(NUM_CLEAN_RUNS)] == [None] * NUM_CLEAN_RUNS


def test_the_command_tells_what_it_found_makes_it_small_and_runs_it_again(tmp_path: Path) -> None:
    file = tmp_path / "case.json"
    bug = ["--bug", "benchmarks.planted_bugs:ignored_deadline"]
    found = CliRunner().invoke(app, ["--seed", "8", "--runs", "2", "--minimise", "--save", str(file), *bug])
    assert found.exit_code == 1
    assert "2 runs, 2 failed" in found.output and "deadlines at" in found.output
    assert f"again: python -m cluster.simulator.faults --plan {file} --bug benchmarks.planted_bugs" in found.output
    case = load_case(file)
    assert (case.plan, len(case.scenario.requests)) == ((), 1)
    assert CliRunner().invoke(app, ["--plan", str(file), *bug]).exit_code == 1
    assert CliRunner().invoke(app, ["--plan", str(file)]).exit_code == 0


@pytest.mark.parametrize("flags", [["--bug", "no.such:thing"], ["--plan", "/no/such/file"], ["--runs", "0"]], ids=str)
def test_a_wrong_flag_is_told_with_exit_code_2(flags: list[str]) -> None:
    assert CliRunner().invoke(app, flags).exit_code == 2
