"""Ours against Dynamo's replay on eight workers: the same table of times, the same engine limits, no network.

    python -m benchmarks.dynamo [--quick] [--json FILE] [--speedups 2,4,6]

The Mooncake conversation trace with its arrivals 2, 4 and 6 times as fast, targets of 2 s to the first token that
decode makes and 25 ms a token. Dynamo: all static splits, of which the best at each rate is the one with the most
requests a second within both. Ours: half of the workers prefill at the start, and the controller does what it likes.
1. First the calibration row of `benchmarks.simulator`: round robin on 4 + 4 at the trace's own rate, where both
   simulators have to agree, or what follows says nothing;
2. Dynamo counts the first token when decode has made it, one step after the prompt is done: our second token less one
   step, the median gap between tokens, is compared with it, and our second token itself is shown beside;
3. a request that ours refuses is infinitely late. Dynamo's report has quantiles alone: the share within a limit lies on
   the line between the two around it.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from benchmarks.report import Row, Target, machine, print_table, print_targets, target, write_json
from benchmarks.simulator import DATA, QUICK_REQUESTS, TRACES, Replay, dynamo_python, dynamo_spec, like_dynamo, replay
from cluster.simulator.log import EventLog
from cluster.simulator.play import simulate
from cluster.simulator.results import SimulationResult
from cluster.simulator.spec import WorldSpec
from cluster.simulator.workloads.load import load_workload
from cluster.simulator.workloads.shape import speed_up

TRACE = "conversation"
NUM_WORKERS = 8
TTFT_S, TPOT_S = 2.0, 0.025
SPEEDUPS = (2.0, 4.0, 6.0)
AGREES = 0.05  # so much the calibration may differ
SHARES = {"min": 0.0, "median": 0.5, "p75": 0.75, "p90": 0.9, "p95": 0.95, "p99": 0.99, "max": 1.0}


@dataclass(frozen=True, slots=True)
class Ours:
    """Times in seconds; `late_s` of all requests, infinite of those that were refused."""

    late_s: tuple[float, ...]  # our second token
    itl_p50_s: float
    itl_p90_s: float
    num_kept: int
    num_refused: int
    num_flips: int
    span_s: float


def main() -> None:
    options = _options()
    if not DATA.exists():
        raise SystemExit(f"{DATA} is not here: nothing to run")
    python, most = dynamo_python(), QUICK_REQUESTS if options.quick else None
    splits = (4,) if options.quick else range(1, NUM_WORKERS)
    speedups = options.speedups[:1] if options.quick else options.speedups
    rows: list[Row] = []
    targets: list[Target] = []
    with ProcessPoolExecutor(2, get_context("spawn")) as pool, Progress(transient=True) as progress:
        bar = progress.add_task("replaying", total=1 + len(speedups))
        calibration = _calibration(pool, python, most)
        progress.advance(bar)
        is_void = abs(float(calibration["ratio"]) - 1) > AGREES  # type: ignore[arg-type]
        for speedup in speedups:
            waiting = pool.submit(_ours, speedup, most)
            hows = [Replay(count, NUM_WORKERS - count, speedup) for count in splits]
            reports = pool.map(replay, repeat(python), repeat(TRACE), repeat(most), hows)
            theirs = dict(zip(splits, reports, strict=True))
            found, met = _compared(speedup, theirs, waiting.result())
            rows += found
            targets += met
            progress.advance(bar)
    print_table("calibration: 4 + 4, round robin, the trace's own rate", [calibration])
    print_table(f"{NUM_WORKERS} workers, {TTFT_S:g} s and {1e3 * TPOT_S:g} ms", rows)
    if is_void:
        print("void: the simulators do not agree where they should")
    print(machine())
    targets = [] if options.quick or is_void else targets
    print_targets(targets)
    write_json(options.json, [calibration, *rows], targets)


def _calibration(pool: ProcessPoolExecutor, python: Path, most: int | None) -> Row:
    ours, theirs = pool.submit(_plain, most), pool.submit(replay, python, TRACE, most)
    our, their = ours.result(), theirs.result()["median_ttft_ms"]
    return {"figure": "TTFT P50 ms", "ours": round(our, 1), "Dynamo": round(their, 1), "ratio": round(our / their, 3)}


def _plain(most: int | None) -> float:
    """As Dynamo does it."""
    requests = _simulated(dynamo_spec(), 1.0, most).requests
    return 1e3 * statistics.median(one.ttft_s + (one.gap_s or 0.0) for one in requests if one.ttft_s is not None)


def _ours(speedup: float, most: int | None) -> Ours:
    router = {"ttft_s": TTFT_S, "tpot_s": TPOT_S, "max_live_requests": 10**6, "max_waiting": 10**5, "deadline_s": 120.0}
    spec = like_dynamo(NUM_WORKERS // 2, {"router": router})
    result = _simulated(replace(spec, is_controlled=True), speedup, most)
    requests = result.requests
    late = [math.inf if one.error or one.ttft_s is None else one.ttft_s + (one.gap_s or 0.0) for one in requests]
    step_s = result.gaps.quantile(0.5) or 0.0
    kept = [
        not one.error and seconds - step_s <= TTFT_S and (one.tpot_s or 0.0) <= TPOT_S
        for one, seconds in zip(requests, late, strict=True)
    ]
    became = [one.what for one in result.happenings if one.what.startswith("became")]
    itls = np.quantile([one.tpot_s for one in requests if one.tpot_s is not None], (0.5, 0.9))
    return Ours(
        tuple(late), step_s, float(itls[1]), sum(kept), sum(bool(one.error) for one in requests), len(became),
        max(one.arrived_s for one in requests),
    )  # fmt: skip


def _simulated(spec: WorldSpec, speedup: float, most: int | None) -> SimulationResult:
    logging.disable(logging.WARNING)
    workload = load_workload(f"trace:path={DATA / 'traces' / TRACES[TRACE]},spread=none", 0, max_requests=most)
    return simulate(spec, speed_up(workload, speedup), EventLog(keep=False, detailed=False))


# --- the comparison -------------------------------------------------------------------------------------------


def _compared(speedup: float, theirs: Mapping[int, dict[str, Any]], ours: Ours) -> tuple[list[Row], list[Target]]:
    rate = len(ours.late_s) / ours.span_s
    within = {count: _within(report, rate) for count, report in theirs.items()}
    best = max(within, key=lambda count: within[count])
    report = theirs[best]
    late_s = float(np.quantile(ours.late_s, 0.9, method="higher"))
    our_s, their_s = late_s - ours.itl_p50_s, report["p90_ttft_ms"] / 1e3
    rows: list[Row] = [
        _row(speedup, f"Dynamo {best} + {NUM_WORKERS - best}, best of {len(theirs)}", report["median_ttft_ms"] / 1e3,
             their_s, report["p90_itl_ms"], within[best], 0, 0),
        _row(speedup, "ours", float(np.quantile(ours.late_s, 0.5, method="higher")) - ours.itl_p50_s, our_s,
             1e3 * ours.itl_p90_s, ours.num_kept / ours.span_s, ours.num_refused / len(ours.late_s), ours.num_flips),
    ]  # fmt: skip
    name = f"x{speedup:g}"
    found = [
        target("dynamo", f"{name} P90 first token of decode, over Dynamo's", our_s / their_s),
        target("dynamo", f"{name} P90 ITL, over Dynamo's", 1e3 * ours.itl_p90_s / report["p90_itl_ms"]),
    ]
    if speedup == max(SPEEDUPS):
        found.append(
            target("dynamo", f"{name} requests/s within, over Dynamo's", ours.num_kept / ours.span_s / within[best])
        )
    return rows, found


def _row(
    speedup: float, who: str, p50_s: float, p90_s: float, itl_ms: float, within: float, refused: float, flips: int
) -> Row:  # fmt: skip
    return {
        "arrivals": f"x {speedup:g}", "who": who, "first token P50 s": f"{p50_s:.2f}", "P90 s": f"{p90_s:.2f}",
        "ITL P90 ms": f"{itl_ms:.1f}", "within both, 1/s": f"{within:.2f}", "refused": f"{refused:.1%}", "flips": flips,
    }  # fmt: skip


def _within(report: Mapping[str, Any], rate: float) -> float:
    """Requests/s that keep both limits, if those that are slow are late."""
    return rate * min(_share(report, "ttft_ms", 1e3 * TTFT_S), _share(report, "tpot_ms", 1e3 * TPOT_S))


def _share(report: Mapping[str, Any], name: str, limit: float) -> float:
    """By its quantiles; no more than that share keeps both."""
    values: Sequence[float] = [report[f"{which}_{name}"] for which in SHARES]
    return float(np.interp(limit, values, list(SHARES.values()), left=0.0, right=1.0))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help=f"the first {QUICK_REQUESTS} requests, one split, one rate"
    )
    parser.add_argument("--json", metavar="FILE", help="write rows and targets there too")
    parser.add_argument(
        "--speedups", type=lambda text: [float(one) for one in text.split(",")], default=list(SPEEDUPS), metavar="X,Y"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
