"""The ratio of prefill to decode workers: ours against rivals on the same engine, in the simulator. Virtual time.

    python -m benchmarks.ratio [--quick] [--json FILE] [--loads A,B] [--workers 8] [--targets 0,1] [--systems X,Y]
        [--scaled] [--goodput] [--processes N] [--resume FILE] [--again X,Y]

Simulated H200 with Qwen3 32B in bfloat16 (published tables), links of 25 GB/s: a smaller model has so many more
requests and tokens at its capacity that the matrix would take days. Even so one system's ten minutes take 25 to 115 s
of CPU on 8 workers and twice that on 16, and the whole matrix about 7 hours on two cores: `--workers 8 --targets 0` is
its first part. Loads, targets and rivals' constants that are searched stand in benchmarks/ratio.yaml, fixed before the
first result; ours has one set of constants for all. The first third of each load is for the search, on the first
targets and the fewest workers; results come from the rest. A request that is refused has missed its targets.
- `static N`: so many prefill workers, all the time. The best of them is the static oracle; the best of each window of
  60 s, one after the other, is the bound of what rebalancing can gain (windows are taken from runs that stay static, so
  it is about a bound, not one);
- `--scaled`: the table again with service times 20 % longer and shorter than planned for;
- `--goodput`: the highest rate at which 90 and 99 % keep their targets, by bisection, of four systems;
- `--resume benchmarks/results/ratio-plays.jsonl`: what has been played before is not played again, but what `--again`
  names.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
from rich.progress import Progress

from benchmarks.ratio_play import Cell, Found, plan
from benchmarks.ratio_store import Plays
from benchmarks.ratio_systems import SYSTEMS, System, searched
from benchmarks.report import Row, Target, machine, print_table, print_targets, target, write_json
from benchmarks.simulator import DATA

QUICK_S = 60.0
OURS = "ours"
BISECTED = (OURS, "aggregated", "static", "DOPD corrected")
PRECISION = 1.08  # of a goodput

# --- the matrix -----------------------------------------------------------------------------------------------


def main() -> None:
    options = _options()
    if not DATA.exists():
        raise SystemExit(f"{DATA} is not here: nothing to run")
    cells = list(_cells(options))
    rows: list[Row] = []
    founds: list[Found] = []
    tuned: dict[str, list[System]] = {}  # by load: one set of a rival's constants for all targets and sizes
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the bar that is being drawn
    with ProcessPoolExecutor(options.processes, spawn) as pool, Progress(transient=True) as progress:
        plays = Plays(pool, options.resume, options.again)
        bar = progress.add_task("simulating", total=len(cells))
        for cell in cells:
            if cell.load not in tuned:
                tuned[cell.load] = _tuned(cell, options.systems, plays, options.search)
            found = _measure(cell, tuned[cell.load], plays)
            founds += found
            table = [_row(one, found) for one in found]
            print_table(cell.name, table)
            rows += [{"cell": cell.name, "times": cell.times, **row} for row in table]
            write_json(options.json, rows, _targets(founds) if not options.quick else [])  # it takes hours
            progress.advance(bar)
        goodputs = list(_goodputs(cells, plays)) if options.goodput else []
    if goodputs:
        print_table("requests/s at which so many keep their targets", goodputs)
    targets = _targets(founds) if not options.quick else []
    print(f"service times: {plan()['service_times']}; {machine()}")
    print_targets(targets)
    write_json(options.json, [*rows, *goodputs], targets)


def _cells(options: argparse.Namespace) -> Iterator[Cell]:
    wanted = plan()
    loads = options.loads.split(",") if options.loads else list(wanted["loads"])
    workers = [int(one) for one in options.workers.split(",")] if options.workers else wanted["workers"]
    pairs = wanted["targets"]
    if options.target_pairs:
        pairs = [pairs[int(index)] for index in options.target_pairs.split(",")]
    seconds, begin_s = (QUICK_S, QUICK_S / 3) if options.quick else (wanted["seconds"], wanted["tuned_s"])
    if options.quick:
        loads, workers, pairs = [options.loads or "stationary"], workers[:1], pairs[:1]
    for times in (1.0, 1.2, 0.8) if options.scaled else (1.0,):
        for num_workers, (ttft_s, tpot_s), load in itertools.product(workers, pairs, loads):
            yield Cell(load, num_workers, ttft_s, tpot_s, times, 1.0, seconds, begin_s)


def _tuned(cell: Cell, names: Sequence[str], plays: Plays, is_searched: bool) -> list[System]:
    """The systems of these names (none: all), each with those of its constants that do best on the load's first third.
    All choices of all systems are played side by side."""
    systems = [system for system in SYSTEMS if not names or system.name in names]
    if not is_searched:
        return systems
    choices = [searched(system) for system in systems]
    ttft_s, tpot_s = plan()["targets"][0]
    first = replace(
        cell, num_workers=plan()["workers"][0], ttft_s=ttft_s, tpot_s=tpot_s, times=1.0, begin_s=0.0, end_s=cell.begin_s
    )
    played = iter(plays.of([one for each in choices if len(each) > 1 for one in each], first))
    return [_best(each, list(itertools.islice(played, len(each)))) if len(each) > 1 else each[0] for each in choices]


def _best(choices: Sequence[System], found: Sequence[Found]) -> System:
    return choices[max(range(len(choices)), key=lambda index: found[index].num_kept)]


def _measure(cell: Cell, systems: Sequence[System], plays: Plays) -> list[Found]:
    """All systems in one cell; the static ones are those splits of which one may be the best, and that one is shown."""
    runs = plays.of([*_static(cell), *systems], cell)
    splits, ours = runs[: len(_static(cell))], runs[len(_static(cell)) :]
    best = max(splits, key=lambda one: one.num_kept)
    return [*ours, best, _windowed(splits, best)]


def _static(cell: Cell) -> list[System]:
    counts = [max(1, round(share * cell.num_workers)) for share in plan()["static_shares"]]
    return [System(f"static {count}", num_prefill=count) for count in dict.fromkeys(counts)]


def _windowed(splits: Sequence[Found], best: Found) -> Found:
    windows = [
        max((one.windows[place] for one in splits), key=lambda each: each[1]) for place in range(len(best.windows))
    ]
    return replace(
        best, system="oracle per window", num_kept=sum(good for _, good in windows), windows=tuple(windows), ttfts_s=(),
        tt2t_s=(), gaps_s=(), tpots_s=(), num_refused=0, cpu_s=sum(one.cpu_s for one in splits),
    )  # fmt: skip


def _goodputs(cells: Sequence[Cell], plays: Plays) -> Iterator[Row]:
    for cell in cells:
        row: Row = {"cell": cell.name}
        for name in BISECTED:
            for kept in (0.9, 0.99):
                row[f"{name} {kept:.0%}"] = f"{_goodput(name, cell, kept, plays):.1f}"
        yield row


def _goodput(name: str, cell: Cell, kept: float, plays: Plays) -> float:
    """Requests/s of this system, or of the best static split."""
    systems = [system for system in SYSTEMS if system.name == name]
    systems = systems or _static(cell)
    low, high = 0.0, math.inf
    rate = 1.0
    while low == 0.0 or high / low > PRECISION:
        share = max(one.attained for one in plays.of(systems, replace(cell, rate=rate)))
        low, high = (rate, high) if share >= kept else (low, rate)
        rate = math.sqrt(low * high) if low and math.isfinite(high) else (2 * low if low else high / 2)
        if rate < 1 / 64 or rate > 16:
            break
    return low * plan()["loads"][cell.load]["rate"] * cell.num_workers / 8


# --- the table ------------------------------------------------------------------------------------------------


def _row(one: Found, all_: Sequence[Found]) -> Row:
    oracle = next(each for each in all_ if each.system == "oracle per window")
    return {
        "system": one.system, "kept": f"{one.attained:.1%}",
        "of oracle": f"{one.num_kept / max(1, oracle.num_kept):.3f}",
        "TTFT P50/90/99 s": _told(one.ttfts_s, 1, 2), "TT2T s": _told(one.tt2t_s, 1, 2),
        "gap ms": _told(one.gaps_s, 1e3, 0), "TPOT ms": _told(one.tpots_s, 1e3, 1),
        "refused": f"{one.num_refused / max(1, one.num_requests):.1%}", "flips": one.num_flips,
        "kept near flips": "-" if one.kept_around_flips is None else f"{one.kept_around_flips:.1%}",
        "device s": round(one.cell.num_workers * (one.cell.seconds - one.cell.begin_s)), "CPU s": round(one.cpu_s, 1),
    }  # fmt: skip


def _told(values: Sequence[float], scale: float, digits: int) -> str:
    return "/".join(f"{scale * value:.{digits}f}" for value in values) or "-"


def _targets(founds: Sequence[Found]) -> list[Target]:
    """Of ours, the worst and the mean over cells, and ratios to rivals over all requests."""
    by_cell: dict[Cell, dict[str, Found]] = {}
    for one in founds:
        by_cell.setdefault(one.cell, {})[
            one.system.split(" ")[0] if one.system.startswith("static ") else one.system
        ] = one
    moving = [each for cell, each in by_cell.items() if cell.load in plan()["moving"] and OURS in each]
    still = [each for cell, each in by_cell.items() if cell.load in plan()["stationary"] and OURS in each]
    found: list[Target] = []
    if moving:
        found.append(target("ratio", "of the oracle per window, moving", _ratio(moving, "oracle per window")))
        found += [
            target("ratio", f"over {name}", _ratio(moving, name))
            for name in ("aggregated", "DistServe replan", "DOPD corrected", "Arrow")
            if all(name in each for each in moving)
        ]
    if still:
        found.append(target("ratio", "of the static oracle, stationary", _ratio(still, "static")))
        flips = [each[OURS].num_flips / each[OURS].cell.num_workers / _ten_minutes(each[OURS].cell) for each in still]
        found.append(target("ratio", "flips per worker and 10 minutes, stationary", max(flips)))
    return found


def _ten_minutes(cell: Cell) -> float:
    return (cell.seconds - cell.begin_s) / 600


def _ratio(cells: Sequence[Mapping[str, Found]], name: str) -> float:
    """The mean over cells of what ours kept over what that one did."""
    return float(np.mean([each[OURS].num_kept / max(1, each[name].num_kept) for each in cells]))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"one load of {QUICK_S:g} s")
    parser.add_argument("--json", metavar="FILE", help="write rows and targets there too")
    parser.add_argument("--loads", metavar="A,B", help="only these")
    parser.add_argument("--workers", metavar="N,M", help="only so many")
    parser.add_argument(
        "--targets", dest="target_pairs", metavar="I,J", help="only these pairs, by their places from 0"
    )
    parser.add_argument("--systems", type=_names, default=[], metavar="X,Y", help="only these")
    parser.add_argument("--no-search", dest="search", action="store_false", help="rivals as published")
    parser.add_argument("--scaled", action="store_true", help="again with service times 20 %% longer and shorter")
    parser.add_argument("--goodput", action="store_true", help="bisect the highest rates")
    parser.add_argument("--resume", metavar="FILE", help="keep what is played there, and play only what is not there")
    parser.add_argument("--again", type=_names, default=[], metavar="X,Y", help="play these again")
    parser.add_argument("--processes", type=int, default=2)
    return parser.parse_args()


def _names(text: str) -> list[str]:
    return text.split(",")


if __name__ == "__main__":
    main()
