"""Plans: the choices are pure and tested by cases; the simulated cluster is asked in small plans by the command."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from cluster.cli import app
from cluster.config import ClusterConfig
from cluster.simulator.log import EventLog
from cluster.simulator.network import LinkTimes
from cluster.simulator.planning.memory import Memory
from cluster.simulator.planning.placements import (
    PhaseGoodput,
    best_phase,
    fewest_gpus,
    most_promising,
    nodes,
    replicas,
    splits,
)
from cluster.simulator.planning.rates import MAX_DOUBLINGS, PRECISION, highest_rate
from cluster.simulator.planning.search import Affinity, Plan, Question, search
from cluster.simulator.planning.targets import Metric, Target, Verdict, judge, parse_targets
from cluster.simulator.planning.trials import FREE, Fleet, Trials, WorkerKind, at_rate, mean_rate
from cluster.simulator.play import simulate
from cluster.simulator.results import RequestResult, SimulationResult
from cluster.simulator.service_times.roofline import Roofline
from cluster.simulator.spec import RoleSpec, WorldSpec
from cluster.simulator.workloads.load import load_workload
from cluster.simulator.workloads.workload import Arrival, Workload
from engine.errors import ConfigError
from engine.types import Role

ROOT = Path(__file__).resolve().parents[2]

# --- targets ----------------------------------------------------------------------------------------------------


def test_targets_have_a_metric_a_quantile_and_a_limit() -> None:
    assert parse_targets("ttft=500ms, tpot:p99=0.08s,tpot:p50=20ms") == (
        Target(Metric.TTFT, 0.9, 0.5), Target(Metric.TPOT, 0.99, 0.08), Target(Metric.TPOT, 0.5, 0.02),
    )  # fmt: skip


@pytest.mark.parametrize(
    "text",
    ["", "ttft=500ms", "ttft=500,tpot=1s", "ttft=0s,tpot=1s", "ttft:p100=1s,tpot=1s", "ttft=1..2s,tpot=1s", "x=1s"],
)
def test_wrong_targets_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--slo"):
        parse_targets(text)


def result(*times: tuple[float, float | None, str], every_s: float = 1.0) -> SimulationResult:
    """Of requests by (TTFT, TPOT, error)."""
    requests = tuple(
        RequestResult(
            f"r{index}", index * every_s, 10, 11 if tpot else 1, 11 if tpot else 1, 0, None if error else ttft, None,
            index * every_s + ttft + 10 * (tpot or 0), error,
        )
        for index, (ttft, tpot, error) in enumerate(times)
    )  # fmt: skip
    return SimulationResult(requests, (), (), len(times) * every_s, 100, 3, "")


TARGETS = parse_targets("ttft:p80=1s,tpot:p50=0.1s")


def test_a_run_keeps_its_targets_when_the_quantiles_do() -> None:
    kept = judge(result((0.5, 0.05, ""), (0.9, 0.3, ""), (1.0, 0.1, ""), (0.2, 0.05, ""), (9.0, 0.2, "")), TARGETS)
    assert kept.keeps
    assert kept.values_s == pytest.approx((1.0, 0.1))
    assert kept.attained == 3 / 5
    assert kept.extrapolated == 0.03
    missed = judge(result((0.5, 0.05, ""), (0.9, 0.3, ""), (1.1, 0.1, ""), (0.2, 0.05, ""), (9.0, 0.2, "")), TARGETS)
    assert not missed.keeps


def test_a_request_that_failed_missed_every_target_and_one_token_has_no_time_per_token() -> None:
    verdict = judge(result((0.1, 0.05, ""), (0.1, 0.0, "overloaded"), (0.1, 0.0, "overloaded")), TARGETS)
    assert verdict.values_s == (math.inf, math.inf)
    assert verdict.attained == 1 / 3
    assert judge(result((0.1, None, ""), (0.1, None, "")), TARGETS).values_s == (0.1, 0.0)


def test_a_run_that_is_short_beside_its_requests_or_its_patience_proves_nothing() -> None:
    one, patience = (1.0, None, ""), parse_targets("ttft=1.2s,tpot=1s")
    for targets, too_short_s, enough_s in ((TARGETS, 0.5, 0.6), (patience, 0.6, 0.7)):
        short, long = (judge(result(*[one] * 10, every_s=every_s), targets) for every_s in (too_short_s, enough_s))
        assert (short.keeps, short.is_short, short.serves) == (True, True, False)
        assert (long.keeps, long.is_short, long.serves) == (True, False, True)
    assert judge(result(*[(1.0, 0.05, "")] * 10, every_s=0.4), parse_targets("ttft=0.1s,tpot=1s")).needed_s == 4.5


# --- rates ------------------------------------------------------------------------------------------------------


@given(st.floats(0.02, 500), st.floats(0.5, 20))
def test_the_highest_rate_is_found_in_few_runs(limit: float, guess: float) -> None:
    asked: list[float] = []

    def keeps(rate: float) -> bool:
        asked.append(rate)
        return rate <= limit

    found = highest_rate(keeps, guess)
    assert found <= limit <= found * (1 + PRECISION)
    assert len(asked) <= abs(math.log2(limit / guess)) + 7
    assert len(set(asked)) == len(asked)


def test_no_rate_and_every_rate_are_ends() -> None:
    assert highest_rate(lambda _: False, 1.0) == 0.0
    assert highest_rate(lambda _: True, 1.0) == 2.0**MAX_DOUBLINGS


# --- placements -------------------------------------------------------------------------------------------------

P1, P2, D1, D2 = PhaseGoodput(1, 2.0), PhaseGoodput(2, 5.0), PhaseGoodput(1, 6.0), PhaseGoodput(2, 10.0)


def test_the_best_size_is_that_of_most_goodput_per_gpu() -> None:
    assert best_phase([P1, P2]) == P2
    assert best_phase([D1, D2]) == D1
    assert best_phase([PhaseGoodput(4, 8.0), P1]) == P1, "of equal ones the smallest"


def test_splits_fit_and_have_both_phases() -> None:
    found = list(splits(6, P2, D1))
    assert {(split.num_prefill, split.num_decode) for split in found} == {
        (1, 1),
        (1, 2),
        (1, 3),
        (1, 4),
        (2, 1),
        (2, 2),
    }
    assert max(split.num_gpus for split in found) == 6
    assert list(splits(2, P2, D1)) == []


def test_the_most_promising_split_balances_the_phases() -> None:
    best = most_promising(list(splits(8, P2, D1)))[0]
    assert (best.num_prefill, best.num_decode, best.promise) == (3, 2, 12.0)
    assert str(best) == "3 x TP2 + 2 x TP1"


def test_the_fewest_gpus_come_first_and_hopeless_splits_never() -> None:
    found = fewest_gpus(list(splits(8, P2, D1)), 9.0)
    assert [(split.num_gpus, split.num_prefill, split.num_decode) for split in found] == [
        (6, 2, 2),
        (7, 2, 3),
        (8, 3, 2),
    ]
    assert fewest_gpus(list(splits(8, P2, D1)), 40.0) == []


def test_nodes_hold_both_phases_the_best_per_gpu_first() -> None:
    found = nodes(4, [P1, P2], [D1, D2])
    assert (found[0].num_prefill, found[0].num_decode, found[0].prefill, found[0].decode) == (1, 1, P2, D1)
    rates = [split.promise / split.num_gpus for split in found]
    assert rates == sorted(rates, reverse=True)
    assert all(split.num_gpus <= 4 for split in found)
    assert nodes(2, [P2], [D1]) == []


def test_replicas_cover_the_rate() -> None:
    assert [replicas(rate, 2.0) for rate in (0.1, 2.0, 2.1, 7.9)] == [1, 1, 2, 4]


def test_memory_beside_the_weights_is_for_kv() -> None:
    memory = Memory(gpu_bytes=80e9, weights_bytes=140e9, kv_token_bytes=320_000)
    assert [memory.kv_tokens(size) for size in (1, 2, 4)] == [0, 12_500, 462_500]


# --- the search, over clusters that are formulas ----------------------------------------------------------------


@dataclass
class Formulas:
    """A cluster serves what its phases do alone, less a part; decode over slow links less again."""

    prefill: dict[int, float]
    decode: dict[int, float]
    loss: float = 0.15
    asked: list[tuple[Fleet, float, LinkTimes | None]] = field(default_factory=list)

    def together(self, fleet: Fleet, rate: float, links: LinkTimes | None = None) -> Verdict:
        self.asked.append((fleet, rate, links))
        alone = min(
            fleet.num_prefill * self.prefill[fleet.prefill.kv_tokens],
            fleet.num_decode * self.decode[fleet.decode.kv_tokens],
        )
        return _verdict(rate <= alone * (1 - self.loss))

    def prefill_guess(self, kind: WorkerKind) -> float:
        return 3.0

    decode_guess = prefill_guess

    def prefill_alone(self, kind: WorkerKind, rate: float) -> Verdict:
        return _verdict(rate <= self.prefill[kind.kv_tokens])

    def decode_alone(self, kind: WorkerKind, rate: float) -> Verdict:
        return _verdict(rate <= self.decode[kind.kv_tokens])


def _verdict(keeps: bool) -> Verdict:
    return Verdict((0.1, 0.1) if keeps else (9.0, 9.0), float(keeps), keeps, 0.0, span_s=9.0, needed_s=3.0)


def plan_for(runs: Formulas, rate: float, num_gpus: int, affinity: Affinity = Affinity.HIGH, per_node: int = 8) -> Plan:
    kinds = {size: WorkerKind(Roofline(), size) for size in runs.prefill}  # a kind is known by its KV tokens here
    return search(Question(rate, num_gpus, per_node, affinity, kinds, LinkTimes()), runs, lambda _: None)


def test_each_phase_gets_its_own_size_and_the_fewest_gpus_that_serve() -> None:
    plan = plan_for(Formulas({1: 2.0, 2: 6.0}, {1: 5.0, 2: 6.0}), rate=10.0, num_gpus=16)
    assert plan.fewest and plan.most
    split = plan.fewest.split
    assert (split.prefill.tensor_parallel, split.decode.tensor_parallel) == (2, 1)
    assert (split.num_prefill, split.num_decode, plan.fewest.num_gpus) == (2, 3, 7), "5 promise 10, and serve 8.5"
    assert plan.most.num_gpus <= 16
    assert plan.most.rate > 0.85 * 20 * (1 - PRECISION)
    assert plan.most.verdict.keeps


def test_more_than_the_gpus_can_serve_is_said() -> None:
    plan = plan_for(Formulas({1: 2.0}, {1: 5.0}), rate=50.0, num_gpus=8)
    assert plan.fewest is None
    assert plan.most and plan.most.rate <= 0.85 * 10


def test_targets_that_no_worker_keeps_give_no_plan() -> None:
    plan = plan_for(Formulas({1: 0.0}, {1: 5.0}), rate=1.0, num_gpus=8)
    assert (plan.fewest, plan.most, plan.tried) == (None, None, ())


def test_where_kv_stays_in_its_node_the_best_node_is_repeated() -> None:
    runs = Formulas({1: 2.0, 2: 6.0}, {1: 5.0, 2: 6.0})
    plan = plan_for(runs, rate=24.0, num_gpus=32, affinity=Affinity.LOW, per_node=8)
    assert plan.fewest and plan.most
    assert plan.fewest.split.num_gpus <= 8
    assert plan.fewest.num_nodes > 1
    assert plan.fewest.num_nodes * 0.85 * plan.fewest.split.promise >= 24.0
    assert plan.most.num_gpus <= 32
    assert all(links is not None for _, _, links in runs.asked), "links of a node"


def test_a_part_of_a_node_is_enough_for_little() -> None:
    plan = plan_for(Formulas({1: 2.0, 2: 6.0}, {1: 5.0, 2: 6.0}), rate=1.0, num_gpus=32, affinity=Affinity.LOW)
    assert plan.fewest and (plan.fewest.num_gpus, plan.fewest.num_nodes) == (2, 1)


# --- trials -----------------------------------------------------------------------------------------------------

STEPS = Roofline(0.0, 0.0, 0.0, 1e-3, 5e-3)  # a prompt of 100 tokens takes 0.1 s
CONFIG = ClusterConfig.model_validate({"engine": {"max_batch_tokens": 100, "prefill_chunk": 100, "max_batch_seqs": 8}})
WORKLOAD = Workload("even", tuple(Arrival(index / 10, 100, 6) for index in range(40)))


def trials(num_requests: int = 40) -> Trials:
    return Trials(CONFIG, WORKLOAD, num_requests, parse_targets("ttft=0.11s,tpot=21ms"), LinkTimes(1e-5, 1e12), 1, 0)


def test_a_workload_is_brought_to_a_rate() -> None:
    assert mean_rate(WORKLOAD) == pytest.approx(10.0)
    assert mean_rate(at_rate(WORKLOAD, 4.0)) == pytest.approx(4.0)


def test_guesses_are_what_a_worker_does_without_pauses() -> None:
    assert trials().prefill_guess(WorkerKind(STEPS, 10_000)) == pytest.approx(10.0)
    assert trials().decode_guess(WorkerKind(STEPS, 10_000)) == pytest.approx(4 / 0.02 / 6), "four at 5 ms each"
    assert trials().decode_guess(WorkerKind(STEPS, 250)) == pytest.approx(2 / 0.01 / 6), "room for two"


def test_prefill_alone_is_a_queue_before_one_worker() -> None:
    alone = trials().prefill_alone(WorkerKind(STEPS, 10_000), 9.9)
    assert alone.keeps
    assert alone.values_s[0] == pytest.approx(0.1, abs=1e-3)
    over = trials().prefill_alone(WorkerKind(STEPS, 10_000), 11.0)
    assert not over.keeps
    assert over.values_s[0] == pytest.approx(0.1 + 35 * (0.1 - 1 / 11), abs=2e-3), "each waits longer than the last"


def test_decode_alone_waits_for_no_prompt() -> None:
    """At 50 requests/s of 5 steps each there are 5 at a time or more, which take 5 ms each."""
    verdict = trials().decode_alone(WorkerKind(STEPS, 10_000), 9.0)
    assert verdict.values_s[1] == pytest.approx(5e-3, rel=0.02)
    assert verdict.values_s[0] < 1e-3
    assert not trials().decode_alone(WorkerKind(STEPS, 10_000), 60.0).keeps


def test_a_sample_that_is_too_short_to_be_believed_grows() -> None:
    seen: list[Verdict] = []
    few = Trials(CONFIG, WORKLOAD, 3, parse_targets("ttft=0.7s,tpot=1s"), LinkTimes(), 1, 0, seen.append)
    verdict = few.together(Fleet(1, 1, WorkerKind(STEPS, 10_000), WorkerKind(STEPS, 10_000)), 9.0)
    shorts = [one.is_short for one in seen]
    assert shorts == sorted(shorts, reverse=True)
    assert (shorts[0], shorts[-1]) == (True, False)
    assert verdict == seen[-1]


def test_blocks_of_a_role_are_its_own() -> None:
    """A decode worker with room for two sequences makes the others wait; a step takes the same for two as for six."""
    steps = Roofline(0.0, 5e-3, 0.0, 1e-3, 0.0)
    spec = WorldSpec(0, CONFIG, roles={Role.DECODE: RoleSpec(steps, 14), Role.PREFILL: RoleSpec(FREE.steps, 400)})
    burst = Workload("burst", tuple(Arrival(0.001 * index, 100, 6) for index in range(6)))
    waited = simulate(spec, burst, EventLog(keep=False))
    assert not any(one.error for one in waited.requests)
    roomy = WorldSpec(0, CONFIG, roles={**spec.roles, Role.DECODE: RoleSpec(steps, 400)})
    assert waited.span_s > simulate(roomy, burst, EventLog(keep=False)).span_s + 0.03


# --- the command ------------------------------------------------------------------------------------------------

TABLE = "model,system,tp,phase,batch_size,isl_or_context,latency_ms\n" + "\n".join(
    f"m,g,{size},{phase},{batch},{length},{latency_ms}"
    for size, phase, batch, length, latency_ms in (
        (1, "prefill", 1, 16, 10), (1, "prefill", 1, 256, 100), (1, "decode", 1, 16, 5), (1, "decode", 64, 256, 30),
        (2, "prefill", 1, 16, 6), (2, "prefill", 1, 256, 45), (2, "decode", 1, 16, 4), (2, "decode", 64, 256, 29),
    )
)  # fmt: skip
WORK = "poisson:rate=5,prompt=16,output=4,seconds=60"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "200", "TERM": "dumb"})


def flags(folder: Path, **changed: str) -> list[str]:
    (folder / "times.csv").write_text(TABLE)
    named = {
        "slo": "ttft=40ms,tpot=8ms", "gpus": "3", "service-times": str(folder / "times.csv"), "requests": "12",
        "output": str(folder / "plan.html"),
    }  # fmt: skip
    return [word for name, value in (named | changed).items() for word in (f"--{name}", value)]


def test_a_plan_says_sizes_ratio_and_gpus_and_draws_them(tmp_path: Path) -> None:
    done = run(WORK, *flags(tmp_path))
    assert done.exit_code == 0, done.output
    assert "prefill alone, TP2" in done.output
    answer = next(line for line in done.output.splitlines() if line.startswith("answer"))
    assert "2 GPUs serve" in answer
    assert "1 x TP1 + 1 x TP1" in answer or "TP2" in answer
    assert "P90 TTFT ms" in done.output
    page = (tmp_path / "plan.html").read_text()
    assert "Plan for" in page
    assert "P90 TTFT at most 40 ms" in page
    assert "https://cdn" not in page.split("Plotly", 1)[0], "needs nothing from elsewhere"


def test_too_few_gpus_are_told_by_the_exit_code(tmp_path: Path) -> None:
    done = run(WORK, *flags(tmp_path, rate="500", gpus="2", requests="8", **{"tensor-parallel": "1"}))
    assert done.exit_code == 1, done.output
    assert "2 GPUs do not serve 500 requests/s within the targets" in done.output


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"slo": "ttft=1s"}, "--slo: tpot is missing"),
        ({"service-times": "nowhere.csv"}, "nowhere.csv: there is no such file"),
        ({"tensor-parallel": "4x"}, "--tensor-parallel: expected sizes"),
        ({"tensor-parallel": "3"}, "got 3"),
        ({"weights-gb": "1000"}, "no tensor-parallel size fits"),
        ({"output": "."}, "--output: a file cannot be made"),
        ({"gpus": "1"}, "Invalid value for '--gpus'"),
        ({"affinity": "some"}, "Invalid value for '--affinity'"),
    ],
    ids=str,
)
def test_a_wrong_flag_is_refused_before_anything_runs(changed: dict[str, str], said: str, tmp_path: Path) -> None:
    done = run(WORK, *flags(tmp_path, **changed))
    assert done.exit_code == 2
    assert said in done.output
    assert "alone" not in done.stdout


def test_requests_that_all_come_at_once_are_no_rate(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 5, "output_length": 2}\n' * 3)
    assert len(load_workload(str(trace), 0).arrivals) == 3
    done = run(str(trace), *flags(tmp_path))
    assert done.exit_code == 2
    assert "come at once, which is no rate" in done.output


def test_ctrl_c_ends_a_plan_and_writes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cluster", "plan", WORK, *flags(tmp_path, requests="200")]
    running = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert running.stdout
    assert "prefill alone" in running.stdout.readline()
    running.send_signal(signal.SIGINT)
    output, errors = running.communicate(timeout=60)
    assert (running.returncode, errors) == (130, "")
    assert "interrupted; nothing is written" in output
    assert not (tmp_path / "plan.html").exists()
