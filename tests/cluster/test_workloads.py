"""Synthetic workloads: their rates, their burstiness, their lengths, and what sessions share; the same from a seed."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from cluster.simulator.chance import Chance
from cluster.simulator.workloads.arrivals import GammaGaps, Gaps, PoissonGaps, WeibullGaps, arrival_times
from cluster.simulator.workloads.lengths import Constant, Moving, Uniform, parse_lengths
from cluster.simulator.workloads.load import load_workload
from cluster.simulator.workloads.prompts import prompt_of
from cluster.simulator.workloads.rates import Ramp, Rate, Sine, Square, Steady
from cluster.simulator.workloads.workload import Workload
from engine.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def cv(values: Sequence[float]) -> float:
    middle = mean(values)
    return math.sqrt(mean([(value - middle) ** 2 for value in values])) / middle


def times(rate: Rate, gaps: Gaps, span_s: float, seed: int = 1) -> list[float]:
    return list(arrival_times(rate, gaps, span_s, Chance(seed)))


# --- when -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gaps", "expected_cv"),
    [
        (PoissonGaps(), 1.0),
        (GammaGaps(0.4), 0.4),
        (GammaGaps(2.5), 2.5),
        (WeibullGaps(2.0), math.sqrt(math.gamma(2) / math.gamma(1.5) ** 2 - 1)),
        (WeibullGaps(0.6), math.sqrt(math.gamma(1 + 2 / 0.6) / math.gamma(1 + 1 / 0.6) ** 2 - 1)),
    ],
)
def test_gaps_have_their_mean_and_their_variation(gaps: Gaps, expected_cv: float) -> None:
    chance = Chance(3)
    drawn = [gaps.draw(chance) for _ in range(20_000)]
    assert mean(drawn) == pytest.approx(1.0, abs=4 * expected_cv / math.sqrt(len(drawn)))
    assert cv(drawn) == pytest.approx(expected_cv, rel=0.06)


RATES: dict[str, Rate] = {
    "steady": Steady(6.0),
    "step": Ramp(2.0, 10.0, 300.0, 300.0),
    "ramp": Ramp(2.0, 10.0, 100.0, 500.0),
    "sine": Sine(6.0, 0.9, 200.0),
    "square": Square(1.0, 9.0, 100.0, 0.25),
}


@pytest.mark.parametrize("name", RATES)
def test_every_minute_has_as_many_arrivals_as_the_rate_says(name: str) -> None:
    rate = RATES[name]
    at = times(rate, PoissonGaps(), 600.0)
    assert at == sorted(at)
    for minute in range(10):
        begin, end = 60.0 * minute, 60.0 * (minute + 1)
        expected = rate.expected_by(end) - rate.expected_by(begin)
        assert sum(begin <= time < end for time in at) == pytest.approx(expected, abs=4 * math.sqrt(expected))


@pytest.mark.parametrize("name", RATES)
def test_what_is_expected_is_the_sum_of_a_rate_that_is_seen_from_nearby(name: str) -> None:
    """Against a sum over small steps of the rates that the docstrings promise."""
    at_rate = {
        "steady": lambda t: 6.0,
        "step": lambda t: 2.0 if t < 300 else 10.0,
        "ramp": lambda t: 2.0 + 8.0 * min(1.0, max(0.0, (t - 100) / 400)),
        "sine": lambda t: 6.0 * (1 + 0.9 * math.sin(2 * math.pi * t / 200)),
        "square": lambda t: 1.0 if t % 100 < 25 else 9.0,
    }[name]
    total = 0.0
    for index in range(6000):
        total += 0.1 * at_rate(0.1 * index + 0.05)
        if index % 500 == 499:
            assert RATES[name].expected_by(0.1 * (index + 1)) == pytest.approx(total, rel=1e-3)


def test_no_arrival_comes_while_the_rate_is_nothing() -> None:
    at = times(Square(5.0, 0.0, 100.0, 0.3), PoissonGaps(), 1000.0)
    assert len(at) > 1000
    assert all(time % 100 <= 30.0 + 1e-6 for time in at)


def test_bursts_stay_bursts_while_the_rate_swings() -> None:
    rate = Sine(6.0, 0.5, 200.0)
    for wanted in (0.3, 3.0):
        expected = [rate.expected_by(time) for time in times(rate, GammaGaps(wanted), 1000.0)]
        assert cv([later - earlier for earlier, later in pairwise(expected)]) == pytest.approx(wanted, rel=0.1)


# --- how long ---------------------------------------------------------------------------------------------------


def test_lengths_have_their_mean() -> None:
    chance = Chance(5)
    uniform = [parse_lengths("uniform:10:20").draw(0.0, chance) for _ in range(5000)]
    assert (min(uniform), max(uniform)) == (10, 20)
    assert mean(uniform) == pytest.approx(15, abs=0.2)
    lognormal = [parse_lengths("lognormal:900:0.8").draw(0.5, chance) for _ in range(20_000)]
    assert mean(lognormal) == pytest.approx(900, rel=0.03)
    assert cv([math.log(length) for length in lognormal]) * mean([math.log(x) for x in lognormal]) == pytest.approx(
        0.8, rel=0.03
    )


def test_a_moving_mean_moves_over_the_span() -> None:
    workload = load_workload("poisson:rate=20,prompt=moving:200:1000:0.3,output=7,seconds=300", 1)
    first = [arrival.num_prompt for arrival in workload.arrivals if arrival.at_s < 30]
    last = [arrival.num_prompt for arrival in workload.arrivals if arrival.at_s >= 270]
    assert mean(first) == pytest.approx(240, rel=0.05)
    assert mean(last) == pytest.approx(960, rel=0.05)
    assert {arrival.num_output for arrival in workload.arrivals} == {7}


def test_lengths_are_written_as_they_are_read() -> None:
    assert parse_lengths("1024") == Constant(1024)
    assert parse_lengths("uniform:1:9") == Uniform(1, 9)
    assert parse_lengths("moving:1:9:0.5") == Moving(1.0, 9.0, 0.5)
    assert parse_lengths("lognormal:9:0.5") == Moving(9.0, 9.0, 0.5)
    for wrong in ("", "0", "-3", "1.5", "uniform:9:1", "uniform:0:1", "uniform:1", "lognormal:9", "lognormal:9:-1",
                  "moving:0:9:1", "normal:1:2", "lognormal:nan:1", "lognormal:inf:1"):  # fmt: skip
        with pytest.raises(ValueError, match="expected a number of tokens"):
            parse_lengths(wrong)


def test_lengths_of_a_trace_are_drawn_as_pairs(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2024-01-01 00:00:00,10,1\n2024-01-01 00:00:01,2000,99\n")
    workload = load_workload(f"poisson:rate=20,lengths={trace}", 1)
    pairs = [(arrival.num_prompt, arrival.num_output) for arrival in workload.arrivals]
    assert sorted(set(pairs)) == [(10, 1), (2000, 99)]
    assert pairs.count((10, 1)) == pytest.approx(len(pairs) / 2, rel=0.1)


# --- sessions ---------------------------------------------------------------------------------------------------

SESSIONS = "sessions:rate=0.2,seconds=100,turns=uniform:2:5,system=128,prompt=uniform:30:300,output=50,think_s=4"


def common(first: Sequence[int], second: Sequence[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(first))


def by_session(workload: Workload) -> list[list[int]]:
    """Numbers of arrivals whose pieces are the same after the system prompt, in order of time."""
    found: dict[int, list[int]] = {}
    for number, arrival in enumerate(workload.arrivals):
        found.setdefault(arrival.pieces[2], []).append(number)
    return list(found.values())


def test_a_turns_prompt_begins_with_all_that_was_said_and_shares_only_the_system_prompt_with_others() -> None:
    workload = load_workload(SESSIONS, 4)
    prompts = [prompt_of(workload, number, 32000) for number in range(len(workload.arrivals))]
    talks = by_session(workload)
    assert len(talks) > 10
    assert all(2 <= len(talk) <= 5 for talk in talks)
    for talk in talks:
        for before, after in pairwise(talk):
            assert common(prompts[before], prompts[after]) == len(prompts[before])
            num_new = len(prompts[after]) - len(prompts[before]) - workload.arrivals[before].num_output
            assert 30 <= num_new <= 300
            waited = workload.arrivals[after].at_s - workload.arrivals[before].at_s
            assert waited > 0.5 + 0.03 * 50
    assert common(prompts[talks[0][0]], prompts[talks[1][0]]) == 128


def test_a_session_ends_before_its_prompt_is_too_long() -> None:
    workload = load_workload("sessions:rate=1,turns=50,max_prompt=1000,seconds=60", 4)
    assert 600 < max(arrival.num_prompt for arrival in workload.arrivals) <= 1000


# --- what users write -------------------------------------------------------------------------------------------


def test_a_yaml_file_and_a_short_text_say_the_same(tmp_path: Path) -> None:
    file = tmp_path / "w.yaml"
    file.write_text("parts:\n  step: {kind: step, rate: 2, to_rate: 6.5, at_s: 20, seconds: 60, prompt: uniform:1:9}\n")
    described = load_workload(str(file), 3)
    short = load_workload("step:rate=2,to_rate=6.5,at_s=20,seconds=60,prompt=uniform:1:9", 3)
    assert described.arrivals == short.arrivals
    assert len(short.arrivals) == pytest.approx(300, abs=70)
    assert described.name == "w"


def test_a_part_is_the_same_whatever_stands_beside_it(tmp_path: Path) -> None:
    alone, beside = tmp_path / "alone.yaml", tmp_path / "beside.yaml"
    part = "  a: {kind: poisson, rate: 2, start_s: 5, max_output: 7}\n"
    alone.write_text("parts:\n" + part)
    beside.write_text("parts:\n  b: {kind: gamma, rate: 2, cv: 2, output: 9}\n" + part)
    ours = load_workload(str(alone), 3).arrivals
    assert ours[0].at_s > 5
    assert ours == tuple(arrival for arrival in load_workload(str(beside), 3).arrivals if arrival.num_output == 7)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/workloads").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_load(path: Path) -> None:
    workload = load_workload(str(path), 1)
    assert len(workload.arrivals) > 100
    assert max(arrival.num_prompt + arrival.num_output for arrival in workload.arrivals) < 8192


def test_it_is_sped_up_and_then_cut() -> None:
    whole = load_workload("poisson:rate=4,seconds=100", 1)
    fast = load_workload("poisson:rate=4,seconds=100", 1, speedup=2, max_s=30, max_requests=200)
    assert [arrival.at_s for arrival in fast.arrivals] == [a.at_s / 2 for a in whole.arrivals if a.at_s < 60][:200]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("poisson:rate=x", "poisson:rate=x: rate: expected a number, got 'x'"),
        ("poisson:seconds=9", "poisson:seconds=9: rate: is missing"),
        ("poisson:rat=4,rate=1", "rat: unknown key; did you mean 'rate'?"),
        ("poisson:rate=4,rate=4", "rate: is given twice"),
        ("poisson:rate", "expected key=value, got 'rate'"),
        ("poisson:rate=0", "poisson:rate=0: has no requests"),
        ("poisson:rate=nan", "rate: Input should be a finite number, got 'nan'"),
        ("poisson:rate=1e5,seconds=1e5", "1e+10 arrivals are expected; at most 5,000,000"),
        ("gamma:rate=4,cv=0", "cv: must be at least 0.05, got '0'"),
        ("ramp:rate=1,to_rate=2,begin_s=9,end_s=3", "end_s: must not come before begin_s (9), got 3"),
        ("sessions:rate=1,system=10", "system: Input should be a multiple of 64, got '10'"),
        ("poisson:rate=1,lengths=x,prompt=3", "lengths: stands instead of prompt and output"),
        ("poisson:rate=1,prompt=0", "prompt: expected a number of tokens, uniform:LOW:HIGH"),
        ("trace:path=nowhere.csv", "nowhere.csv: cannot be read: No such file"),
        ("nowhere.yaml", "nowhere.yaml: cannot be read: No such file"),
    ],
)
def test_a_mistake_is_told_with_its_key(source: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_workload(source, 1)
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parts: {}", "parts: "),
        ("part: {a: {kind: poisson}}", "part: unknown key; did you mean 'parts'?"),
        ("parts: {a: {rate: 1}}", "parts.a.kind: expected one of poisson, gamma"),
        ("parts: {a: {kind: [1], rate: 1}}", "parts.a.kind: expected one of poisson, gamma"),
        ("parts: {a: {kind: poisson, rate: fast}}", "parts.a.rate: expected a number, got 'fast'"),
        ("parts: {a: {kind: sine, rate: 1, period: 3}}", "parts.a.period: unknown key; did you mean 'period_s'?"),
        ("parts: {a: {kind: poisson, rate: 1}, a: {}}", "line 1: the key 'a' is given twice"),
        ("parts: {a: 3}", "parts.a: expected keys with values, got 3"),
    ],
)
def test_a_mistake_in_a_file_is_told_with_its_path(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "w.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_workload(str(file), 1)
    assert caught.value.message.startswith(f"{file}: ")
    assert message in caught.value.message


# --- the same again ---------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_workload_in_every_process() -> None:
    sources = ["configs/workloads/chat-and-batch.yaml", SESSIONS, "weibull:rate=4,shape=0.5,prompt=lognormal:900:1"]
    code = (
        "import sys, hashlib; from cluster.simulator.workloads.load import load_workload as load\n"
        "for source in sys.argv[1:]: print(hashlib.sha256(repr(load(source, 7)).encode()).hexdigest())"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code, *sources], cwd=ROOT, stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
        )
        for hash_seed in ("1", "4242")
    ]  # fmt: skip
    first, second = (run.communicate(timeout=60)[0] for run in runs)
    assert [run.returncode for run in runs] == [0, 0]
    assert first == second
    assert len(set(first.split())) == 3


def test_another_seed_gives_another_workload() -> None:
    assert load_workload(SESSIONS, 7) == load_workload(SESSIONS, 7) != load_workload(SESSIONS, 8)
