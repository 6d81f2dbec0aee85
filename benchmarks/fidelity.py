"""How near the simulator comes to the live cluster: TTFT and TPOT of the same requests, measured and simulated.

    python -m benchmarks.fidelity [--quick] [--rounds N] [--most N] [--json FILE]

Starts `steelyard serve` with configs/local.yaml. A round is a profile (as `steelyard profile` measures, of the sizes
that the load has), an open-loop load of Poisson arrivals that is used for no fit, and a profile, which is the next
round's first. The same arrivals are simulated with what both profiles measured. A round whose two profiles differ by
more than 10 % is void: the machine changed under it. Rounds are short, for a shared machine is seldom steady for long.
Void rounds are counted, shown, and measured again, up to five times as many rounds as asked for. Each round takes about
80 s and is printed when it ends.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.report import Row, machine, median, print_table, print_targets, target, write_json
from benchmarks.serve import Cluster
from cluster.config import load_config
from cluster.profiling.as_profile import profile_of
from cluster.profiling.live import LiveCluster, Served
from cluster.profiling.measure import ID_RANGE, ensure_quiet, measure
from cluster.profiling.observed import Observed
from cluster.profiling.plan import Plan
from cluster.simulator.log import EventLog
from cluster.simulator.play import simulate
from cluster.simulator.profiled import profiled_world
from cluster.simulator.service_times.measured import MeasuredTimes
from cluster.simulator.service_times.profile import WorkerProfile
from cluster.simulator.spec import WorldSpec
from cluster.simulator.workloads.load import load_workload
from cluster.simulator.workloads.workload import Workload
from engine.step_shape import Chunk, StepShape

CONFIG = Path("configs/local.yaml")
MAX_DIFFERENCE = 0.10  # of two profiles around a load
UTILISATION = 0.5  # of the prefill worker, while decode runs beside it
MEAN_PROMPT, MAX_PROMPT, MEAN_OUTPUT, MAX_OUTPUT = 140, 480, 36, 120  # tokens
PROMPTS = f"prompt=lognormal:{MEAN_PROMPT}:0.6,max_prompt={MAX_PROMPT}"
OUTPUTS = f"output=lognormal:{MEAN_OUTPUT}:0.5,max_output={MAX_OUTPUT}"
PLAN = Plan(
    (16, 64, 128, 256, MAX_PROMPT),
    ((128, 32),),
    (64, 192),
    (8, 4, 2, 1),
    beside=(64, 128, 192, 320, MAX_PROMPT),
    num_beside=10,
)
LOAD_S, QUICK_LOAD_S = 40.0, 20.0
ONE_ROUND_S = 1.0  # less than a round of the plan takes: one is measured
MOST_ROUNDS = 5  # for each that is asked for
FIGURES = ("TTFT P50", "TTFT P90", "TPOT P50", "TPOT P90")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one round with a short load: two minutes, most of them a start and profiles",
    )
    parser.add_argument("--rounds", type=int, default=5, help="that are not void")
    parser.add_argument("--most", type=int, help=f"rounds in all; {MOST_ROUNDS} times as many if not given")
    parser.add_argument("--json", metavar="FILE", help="write rows and targets there too")
    options = parser.parse_args()
    logging.getLogger("router").setLevel(logging.ERROR)  # simulated workers leave at the end of each simulation
    num_rounds, load_s = (1, QUICK_LOAD_S) if options.quick else (options.rounds, LOAD_S)
    most = options.most or (1 if options.quick else MOST_ROUNDS * num_rounds)
    with Cluster({}) as cluster:
        rounds = asyncio.run(measure_rounds(cluster.url, num_rounds, load_s, most))
    valid = [one for one in rounds if not one.is_void]
    print_table(
        f"Simulated beside measured, 1 prefill + 1 decode worker on one host; {machine()}", [*map(_row, rounds)]
    )
    print(
        f"{len(valid)} rounds count, {len(rounds) - len(valid)} are void (profiles differ by over {MAX_DIFFERENCE:.0%})"
    )
    errors = [median([one.errors[index] for one in valid]) if valid else float("nan") for index in range(len(FIGURES))]
    shown = [f"{name} {median([one.errors[index] for one in rounds]):.0%}" for index, name in enumerate(FIGURES)]
    print(f"median errors of all rounds, void ones too: {', '.join(shown)}")
    targets = [target("fidelity", name, error) for name, error in zip(FIGURES, errors, strict=True)]
    print_targets(targets)
    write_json(options.json, [one.as_json for one in rounds], targets)


@dataclass(frozen=True, slots=True)
class Times:
    """Of every request of a load, in seconds, in order; TPOT is NaN for a single token."""

    ttft_s: tuple[float, ...]
    tpot_s: tuple[float, ...]

    @property
    def figures(self) -> tuple[float, ...]:
        """In the order of FIGURES."""
        quantiles = (0.5, 0.9)
        return (*np.quantile(self.ttft_s, quantiles).tolist(), *np.nanquantile(self.tpot_s, quantiles).tolist())


@dataclass(frozen=True, slots=True)
class Round:
    workload: Workload
    profile: WorkerProfile  # of both
    difference: float  # between the two
    measured: Times
    simulated: Times

    @property
    def is_void(self) -> bool:
        return self.difference > MAX_DIFFERENCE

    @property
    def errors(self) -> list[float]:
        """Relative, one for each figure."""
        pairs = zip(self.simulated.figures, self.measured.figures, strict=True)
        return [abs(simulated / measured - 1) for simulated, measured in pairs]

    @property
    def as_json(self) -> Row:
        return {
            "void": self.is_void, "difference": self.difference, "errors": dict(zip(FIGURES, self.errors, strict=True)),
            "measured": asdict(self.measured), "simulated": asdict(self.simulated),
            "arrivals": [asdict(arrival) for arrival in self.workload.arrivals],
            "profile": self.profile.model_dump(),
        }  # fmt: skip


async def measure_rounds(url: str, num_rounds: int, load_s: float, most: int) -> list[Round]:
    """Until `num_rounds` count, or there are as many as `most`."""
    rounds: list[Round] = []
    async with LiveCluster(url) as cluster:
        served, before = await measure(cluster, _say, PLAN, ONE_ROUND_S)
        while sum(not one.is_void for one in rounds) < num_rounds and len(rounds) < most:
            workload = load_of(profile_of(served, before, machine()), load_s, seed=len(rounds))
            _say(f"load of {len(workload.arrivals)} requests", 0.0)
            measured = await play_live(cluster, served, workload, seed=len(rounds))
            served, after = await measure(cluster, _say, PLAN, ONE_ROUND_S)
            one = await asyncio.to_thread(compare, served, before, after, workload, measured)  # its loop is its own
            _say(f"round {len(rounds) + 1}: " + ", ".join(f"{name} {told}" for name, told in _row(one).items()), 1.0)
            rounds.append(one)
            before = after
    return rounds


def load_of(profile: WorkerProfile, load_s: float, seed: int) -> Workload:
    """Arrivals that keep this cluster partly busy."""
    times = MeasuredTimes([step.record for step in profile.steps])
    prompt_s = times.step_s(StepShape((Chunk(0, MEAN_PROMPT),))) * profile.slowdown.prefill
    return load_workload(f"poisson:rate={UTILISATION / prompt_s:.4f},seconds={load_s},{PROMPTS},{OUTPUTS}", seed)


async def play_live(cluster: LiveCluster, served: Served, workload: Workload, seed: int) -> Times:
    """The open loop: each request at its time, whether earlier ones are served or not."""
    chance = np.random.default_rng(seed)
    begun = time.perf_counter()
    tasks = []
    async with asyncio.TaskGroup() as group:
        for arrival in workload.arrivals:
            prompt = chance.integers(*ID_RANGE, arrival.num_prompt).tolist()
            await asyncio.sleep(max(0.0, begun + arrival.at_s - time.perf_counter()))
            tasks.append(group.create_task(cluster.answer(served.model, prompt, arrival.num_output)))
    await ensure_quiet(cluster)
    answers = [task.result() for task in tasks]
    tpot = [
        (answer.end_s - answer.first_s) / (arrival.num_output - 1) if arrival.num_output > 1 else float("nan")
        for answer, arrival in zip(answers, workload.arrivals, strict=True)
    ]
    return Times(tuple(answer.first_s for answer in answers), tuple(tpot))


def compare(served: Served, before: Observed, after: Observed, workload: Workload, measured: Times) -> Round:
    both = Observed(before.alone + after.alone, before.beside + after.beside, before.probes + after.probes)
    profile = profile_of(served, both, machine())
    difference = difference_of(before, after, MeasuredTimes([step.record for step in profile.steps]))
    return Round(workload, profile, difference, measured, simulated(served, profile, workload))


def difference_of(before: Observed, after: Observed, both: MeasuredTimes) -> float:
    """How much slower or faster steps have become on (geometric) average, beside the times of `both`: the larger of the
    differences of steps with chunks and of those without."""
    shifts = []
    for has_chunks in (True, False):
        steps = [[one for one in half.alone if bool(one.shape.chunks) == has_chunks] for half in (before, after)]
        first, second = (np.mean([np.log(one.step_s / both.step_s(one.shape)) for one in half]) for half in steps)
        shifts.append(abs(float(second - first)))
    return float(np.exp(max(shifts))) - 1


def simulated(served: Served, profile: WorkerProfile, workload: Workload) -> Times:
    spec = WorldSpec(seed=0, config=load_config(CONFIG), max_context=served.max_context, plain=True)
    result = simulate(profiled_world(spec, profile, one_host=True), workload, EventLog(keep=False))
    requests = result.requests
    assert all(one.ttft_s is not None for one in requests), [one.error for one in requests if one.error]
    tpot = [float("nan") if one.tpot_s is None else one.tpot_s for one in requests]
    return Times(tuple(one.ttft_s or 0.0 for one in requests), tuple(tpot))


def _row(one: Round) -> Row:
    row: Row = {
        "requests": len(one.workload.arrivals),
        "profiles differ": f"{one.difference:.1%}",
        "counts": "no" if one.is_void else "yes",
    }
    pairs = zip(FIGURES, one.measured.figures, one.simulated.figures, strict=True)
    return row | {f"{name} ms": f"{1e3 * a:.0f} / {1e3 * b:.0f} ({b / a - 1:+.0%})" for name, a, b in pairs}


def _say(what: str, _share: float) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", flush=True)


if __name__ == "__main__":
    main()
