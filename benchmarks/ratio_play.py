"""One system in one cell of the matrix of benchmarks/ratio.py: a load, so many workers, a pair of targets.

`play` simulates it in this process; loads are those of benchmarks/ratio.yaml.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.ratio_systems import System
from benchmarks.simulator import DATA
from cluster.config import ClusterConfig
from cluster.control.controller import Controller
from cluster.simulator.fleet import RestartingFleet, SimulatedFleet
from cluster.simulator.log import EventLog
from cluster.simulator.network import LinkTimes
from cluster.simulator.play import simulate
from cluster.simulator.results import RequestResult, SimulationResult
from cluster.simulator.service_times.load import load_service_times
from cluster.simulator.service_times.model import ServiceTimes
from cluster.simulator.spec import WorldSpec
from cluster.simulator.workloads.load import load_workload
from cluster.simulator.workloads.shape import cut, mix, shift, speed_up
from cluster.simulator.workloads.workload import Workload
from cluster.simulator.world import World
from engine.errors import Overloaded
from engine.step_shape import StepShape

PLAN = Path(__file__).with_name("ratio.yaml")
SEED = 1
BLOCK_SIZE = 64
WINDOW_S = 60.0
AROUND_FLIP_S = 30.0
LONGEST_S = 180.0  # interval of a rival
FLIP_TIMEOUT_S = 600.0  # of those who start anew


@dataclass(frozen=True, slots=True)
class Cell:
    """One load, on so many workers, with these targets; `times`: service times, as parts of the table's."""

    load: str
    num_workers: int
    ttft_s: float
    tpot_s: float
    times: float = 1.0
    rate: float = 1.0  # as part of the load's
    seconds: float = 600.0
    begin_s: float = 200.0  # what arrives before is not counted
    end_s: float = math.inf  # what arrives after that does not

    @property
    def name(self) -> str:
        return f"{self.load}, {self.num_workers} workers, {self.ttft_s:g} s / {1e3 * self.tpot_s:g} ms"


@dataclass(frozen=True, slots=True)
class Found:
    """Of one system in one cell. `windows`: of each window, requests that came and requests that kept their targets."""

    system: str
    cell: Cell
    num_requests: int
    num_kept: int
    num_refused: int
    ttfts_s: tuple[float, ...]  # quantiles 50, 90, 99
    tt2t_s: tuple[float, ...]
    gaps_s: tuple[float, ...]
    tpots_s: tuple[float, ...]
    num_flips: int
    kept_around_flips: float | None
    windows: tuple[tuple[int, int], ...]
    cpu_s: float

    @property
    def attained(self) -> float:
        return self.num_kept / max(1, self.num_requests)


# --- one run --------------------------------------------------------------------------------------------------


class Scaled:
    """Service times so many times as long. Implements ServiceTimes."""

    def __init__(self, steps: ServiceTimes, times: float) -> None:
        self._steps, self._times = steps, times

    def step_s(self, shape: StepShape) -> float:
        return self._times * self._steps.step_s(shape)

    def decode_steps_s(self, num_decoding: int, num_context: int, num_steps: int) -> list[float]:
        return [self._times * step_s for step_s in self._steps.decode_steps_s(num_decoding, num_context, num_steps)]

    def extrapolates(self, shape: StepShape) -> bool:
        return self._steps.extrapolates(shape)


@cache
def table() -> ServiceTimes:
    return load_service_times(str(DATA / plan()["service_times"]), tensor_parallel=1)


def play(system: System, cell: Cell) -> Found:
    """In this process."""
    logging.disable(logging.WARNING)
    begun = time.process_time()
    workload = cut(workload_of(cell.load, cell.num_workers, cell.rate, cell.seconds), max_s=cell.end_s)
    spec = spec_of(system, cell)

    def on_start(world: World) -> None:
        if system.rival is None:
            return
        fleet = RestartingFleet(world, system.start_s) if system.start_s else SimulatedFleet(world)
        rules = spec.config.controller.model_copy(update={"flip_timeout_s": FLIP_TIMEOUT_S, "window_s": LONGEST_S})
        world.control(Controller(fleet, rules, on_flipped=world.flipped, rival=system.rival()))

    result = simulate(spec, workload, EventLog(keep=False, detailed=False), on_start=on_start)
    return _found(system.name, cell, result, time.process_time() - begun)


def spec_of(system: System, cell: Cell) -> WorldSpec:
    num_prefill = system.num_prefill or max(1, cell.num_workers // 2)
    config = ClusterConfig.model_validate(
        {
            "engine": {
                "num_blocks": plan()["kv_tokens"] // BLOCK_SIZE, "block_size": BLOCK_SIZE,
                "max_batch_tokens": 8192, "prefill_chunk": 8192, "max_batch_seqs": 256, "prefix_cache": True,
            },
            "pools": {"prefill": {"workers": num_prefill}, "decode": {"workers": cell.num_workers - num_prefill}},
            "router": {
                "policy": system.policy, "ttft_s": cell.ttft_s, "tpot_s": cell.tpot_s, "max_live_requests": 10**6,
                "max_waiting": 10**5, "deadline_s": 120.0,
            },
            "prefill": {"refuse_late": system.policy == "slo"},
        }
    )  # fmt: skip
    steps = table() if cell.times == 1.0 else Scaled(table(), cell.times)
    return WorldSpec(
        SEED, config, steps, LinkTimes(bytes_per_s=25e9), plain=True, frame_bytes=2**27, max_context=250_000,
        kv_token_bytes=plan()["kv_token_bytes"], is_controlled=system.is_ours,
        believed=table(),
    )  # fmt: skip


def workload_of(load: str, num_workers: int, rate: float, seconds: float) -> Workload:
    wanted = plan()["loads"][load]
    per_s = wanted["rate"] * rate * num_workers / 8
    if wanted["source"] == "ratio-sine":
        return _against_each_other(per_s, seconds)
    text = wanted["source"].format(
        traces=DATA / "traces", rate=per_s, half=per_s / 2, middle=0.55 * seconds, seconds=seconds
    )
    workload = load_workload(text, SEED)
    if text.startswith("trace:"):
        own = len(workload.arrivals) / workload.span_s
        workload = _again_until(speed_up(workload, per_s / own), seconds)
    return cut(workload, max_s=seconds)


def _again_until(workload: Workload, seconds: float) -> Workload:
    """A trace that is over before that begins again, with the same prefixes."""
    arrivals = list(workload.arrivals)
    span_s = workload.span_s + workload.span_s / len(arrivals)
    while arrivals[-1].at_s < seconds:
        turn = len(arrivals) // len(workload.arrivals)
        arrivals += shift(workload, turn * span_s).arrivals
    return replace(workload, arrivals=tuple(arrivals))


def _against_each_other(per_s: float, seconds: float) -> Workload:
    """Long prompts with short answers and short prompts with long answers, whose rates swing in opposite phases."""
    half, period_s = per_s / 2, seconds / 2.5
    shapes = "max_prompt=16000,max_output=1500"
    heavy = load_workload(
        f"sine:rate={half},amplitude=0.9,period_s={period_s},seconds={seconds + period_s / 2},"
        f"prompt=lognormal:6000:0.6,output=lognormal:40:0.5,{shapes}", SEED,
    )  # fmt: skip
    light = load_workload(
        f"sine:rate={half},amplitude=0.9,period_s={period_s},seconds={seconds + period_s / 2},"
        f"prompt=lognormal:800:0.6,output=lognormal:400:0.5,{shapes}", SEED + 1,
    )  # fmt: skip
    later = [arrival for arrival in heavy.arrivals if arrival.at_s >= period_s / 2]
    return cut(mix("sine", [shift(replace(heavy, arrivals=tuple(later)), -period_s / 2), light]), max_s=seconds)


@cache
def plan() -> Mapping[str, Any]:
    return yaml.safe_load(PLAN.read_text())


# --- what came of it ------------------------------------------------------------------------------------------


def keeps(one: RequestResult, cell: Cell) -> bool:
    if one.error or one.ttft_s is None or one.num_output < one.num_wanted:
        return False
    return one.ttft_s <= cell.ttft_s and (one.tpot_s or 0.0) <= cell.tpot_s


def _found(name: str, cell: Cell, result: SimulationResult, cpu_s: float) -> Found:
    counted = [one for one in result.requests if one.arrived_s >= cell.begin_s]
    assert counted, "the load goes on for as long as is counted"
    kept = [keeps(one, cell) for one in counted]
    flips = [one.at_s for one in result.happenings if one.what.startswith("became") and one.at_s >= cell.begin_s]
    near = [good for one, good in zip(counted, kept, strict=True) if _is_near(one.arrived_s, flips)]
    num_windows = math.ceil((cell.seconds - cell.begin_s) / WINDOW_S)
    windows = [[0, 0] for _ in range(num_windows)]
    for one, good in zip(counted, kept, strict=True):
        window = windows[min(num_windows - 1, int((one.arrived_s - cell.begin_s) / WINDOW_S))]
        window[0] += 1
        window[1] += good
    return Found(
        name, cell, len(counted), sum(kept), sum(one.error == Overloaded.code for one in counted),
        _quantiles(one.ttft_s for one in counted),
        _quantiles(one.ttft_s + one.gap_s for one in counted if one.ttft_s is not None and one.gap_s is not None),
        _quantiles(one.gap_s for one in counted), _quantiles(one.tpot_s for one in counted), len(flips),
        sum(near) / len(near) if near else None, tuple((came, good) for came, good in windows), cpu_s,
    )  # fmt: skip


def _is_near(at_s: float, flips: Sequence[float]) -> bool:
    return any(abs(at_s - flip) <= AROUND_FLIP_S for flip in flips)


def _quantiles(values: Iterable[float | None]) -> tuple[float, ...]:
    known = [value for value in values if value is not None]
    return tuple(float(value) for value in np.quantile(known, (0.5, 0.9, 0.99))) if known else ()
