"""`steelyard simulate` as its user meets it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from cluster.cli import app

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs/local.yaml")
TINY = "poisson:rate=8,prompt=40,output=4,seconds=2"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})


def digest_of(text: str) -> str:
    (digest,) = re.findall(r"digest ([0-9a-f]{32})", text)
    return digest


def test_it_prints_a_table_and_writes_the_report_figures_and_log(tmp_path: Path) -> None:
    report, figures, log = tmp_path / "r.html", tmp_path / "r.json", tmp_path / "r.log"
    done = run(
        "simulate", CONFIG, "--trace", TINY, "--seed", "3", "--requests", "9", "--speedup", "2",
        "--slo-ttft-ms", "1000", "--slo-tpot-ms", "0.001",
        "--output", str(report), "--json", str(figures), "--log", str(log),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert re.search(r"TTFT +\d+\.\d +\d+\.\d +\d+\.\d +1,000\.0 +100\.0 %", done.stdout)
    assert re.search(r"TPOT .* 0\.0 %", done.stdout)
    assert "kept by 0.0 % of the requests" in done.stdout
    assert "9 of 9 answered whole" in done.stdout
    assert str(report) in done.stdout
    read = json.loads(figures.read_text())
    assert read["digest"] == digest_of(done.stdout)
    assert read["summary"]["ttft"]["attained"] == 1
    assert len(read["requests"]) == 9
    assert {request["num_output"] for request in read["requests"]} == {4}
    page = report.read_text()
    assert read["digest"] in page
    assert f"--trace {TINY} --seed 3 --service-times default --speedup 2 --requests 9" in page
    assert page.count('class="plotly-graph-div"') == 12
    lines = log.read_text().splitlines()
    assert sum(" request id=r" in line for line in lines) == 9


def test_the_same_seed_gives_the_same_report(tmp_path: Path) -> None:
    pages, digests = [], []
    for seed, name in (("1", "a"), ("1", "b"), ("2", "c")):
        done = run("simulate", CONFIG, "--trace", TINY, "--seed", seed, "--output", str(tmp_path / name))
        pages.append((tmp_path / name).read_bytes())
        digests.append(digest_of(done.stdout))
    assert digests[0] == digests[1] != digests[2]
    assert pages[0] == pages[1] != pages[2]


def test_with_a_profile_it_is_the_cluster_that_was_measured(tmp_path: Path) -> None:
    steps = [{"chunks": [[0, 40]], "step_ms": 400.0}, {"chunks": [[0, 20]], "step_ms": 200.0}]
    steps += [{"num_decoding": n, "num_context": 42 * n, "step_ms": 30.0} for n in (1, 2, 4)]
    profile = {
        "version": 1, "model": "m", "device": "d", "steps": steps, "gateway_ms": 100.0, "token_ms": 1.0,
        "link": {"latency_ms": 5.0, "gb_per_s": 1.0}, "slowdown": {"prefill": 1.0, "decode": 3.0},
    }  # fmt: skip
    path, figures = tmp_path / "profile.yaml", tmp_path / "r.json"
    path.write_text(yaml.safe_dump(profile))
    trace = "poisson:rate=0.2,prompt=40,output=4,seconds=20"
    for flags, tpot_s in (([], 0.031), (["--one-host"], 0.031)):  # one request at a time: nobody computes beside it
        done = run(
            "simulate", CONFIG, "--trace", trace, "--service-times", str(path), *flags,
            "--output", str(tmp_path / "r"), "--json", str(figures),
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        first = json.loads(figures.read_text())["requests"][0]
        assert 0.5 < first["ttft_s"] < 0.53  # gateway, ways of 5 ms, and the step of the prompt
        tail_s = first["ended_s"] - first["arrived_s"] - first["ttft_s"] - first["gap_s"]
        assert tail_s / 2 == pytest.approx(tpot_s, rel=0.06)
    done = run("simulate", CONFIG, "--trace", trace, "--one-host", "--output", str(tmp_path / "r"))
    assert (done.exit_code, done.stdout) == (2, "")
    assert "--one-host" in done.stderr and "profile" in done.stderr


def test_requests_that_cannot_be_served_are_told(tmp_path: Path) -> None:
    done = run(
        "simulate", CONFIG, "--trace", "poisson:rate=8,prompt=40000,output=4,seconds=1", "--output", str(tmp_path / "r")
    )
    assert done.exit_code == 0
    assert re.search(r"error +\d+ invalid_request", done.stdout)
    assert re.search(r"requests +0 of \d+ answered whole", done.stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--trace"),
        (["--trace", "poisson:rate=x"], "rate: expected a number"),
        (["--trace", "nowhere.csv"], "nowhere.csv: cannot be read"),
        (["--trace", TINY, "--speedup", "0"], "speedup: must be more than 0"),
        (["--trace", TINY, "--requests", "0"], "--requests"),
        (["--trace", TINY, "--slo-ttft-ms", "-1"], "--slo-ttft-ms"),
        (["--trace", TINY, "--seed", "x"], "--seed"),
        (["--trace", TINY, "--service-times", "nowhere"], "nowhere"),
        (["--trace", TINY, "--output", "no/such/folder/r.html"], "--output: a file cannot be made at no/such/folder"),
        (["--trace", TINY, "--json", "."], "--json: a file cannot be made at ."),
    ],
)
def test_a_mistake_ends_with_2_and_is_named(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("simulate", CONFIG, *arguments)
    assert done.exit_code == 2
    assert message in re.sub(r"\x1b\[[0-9;]*m", "", done.output)
    assert not list(tmp_path.iterdir())


def test_a_mistake_in_the_config_is_named(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("pools: {prefil: {workers: 2}}")
    done = run("simulate", str(config), "--trace", TINY)
    assert done.exit_code == 2
    assert "pools.prefil: unknown key; did you mean 'prefill'?" in done.output


def test_an_interrupt_ends_it_quietly(tmp_path: Path) -> None:
    command = ["-m", "cluster", "simulate", CONFIG, "--trace", "poisson:rate=5,seconds=600,output=9"]
    with subprocess.Popen(
        [sys.executable, *command, "--output", str(tmp_path / "r")], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert "requests arrive in" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in stdout
    assert stderr == ""
    assert not list(tmp_path.iterdir())
