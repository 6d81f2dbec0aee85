"""Live workers that come and leave with the load, through Ray.

    python -m benchmarks.scale [--quick] [--show] [--json FILE]

1. One prefill and one decode worker of the default model on this machine, float32, greedy; up to four may be there.
   Every prompt is answered once while the cluster is idle;
2. a few requests come, then many (open loop, Poisson), then a few again;
3. every answer must be complete and the very one of before, whoever came or left meanwhile (the golden law);
4. the controller's journal says whom it had come and leave, and when each was there and gone.
On two cores four workers compute no more than two: this shows that it works, not that it pays.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.flip import SHORT_ANSWER, cluster_of, failures, prompts, require_same, show, unloaded
from benchmarks.open_loop import Arrival, Outcome, play, schedule
from benchmarks.report import Row, machine, median, print_table, write_json
from benchmarks.slo import served_model
from cluster.control.journal import Line
from cluster.explain import read_lines

MOST = 4
RATES = 0.5, 6.0, 0.5  # requests/s: a few, many, a few
PHASES_S = 15.0, 60.0, 60.0
SCALE: dict[str, object] = {"max_workers": MOST, "add_after_s": 5.0, "remove_after_s": 10.0, "drain_s": 20.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short phases")
    parser.add_argument("--show", action="store_true", help="tell of the pools while they change")
    parser.add_argument("--json", metavar="FILE", help="write rows there too")
    options = parser.parse_args()
    phases_s = (5.0, 25.0, 5.0) if options.quick else PHASES_S
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "journal.jsonl"
        with cluster_of(journal, 1, {"scale": SCALE}) as cluster:
            outcomes = asyncio.run(_play(cluster.url, phases_s, options.show))
        rows = [_row(outcomes, list(read_lines(journal)))]
    print_table(f"1 + 1 workers, up to {MOST}, float32; {machine()}", rows)
    write_json(options.json, rows, [])


async def _play(url: str, phases_s: Sequence[float], shows: bool) -> list[Outcome]:
    model = await served_model(url)
    long, _ = prompts()
    answers = await unloaded(url, model, long)
    arrivals, begin_s = list[Arrival](), 0.0
    for phase, (rate, seconds) in enumerate(zip(RATES, phases_s, strict=True)):
        found = schedule(long, rate, seconds, SHORT_ANSWER, seed=phase)
        arrivals += [replace(one, at_s=one.at_s + begin_s) for one in found]
        begin_s += seconds
    showing = asyncio.create_task(show(url)) if shows else None
    outcomes = await play(url, model, arrivals)
    if showing is not None:
        showing.cancel()
    require_same(outcomes, answers)
    return outcomes


def _row(outcomes: Sequence[Outcome], lines: Sequence[Line]) -> Row:
    failed = failures(outcomes)
    came_s, orders = list[float](), [line for line in lines if line.plan.resize is not None]
    for line in orders:
        there = next((late for late in lines if late.look.now > line.look.now and not late.look.coming), None)
        if line.plan.resize is not None and line.plan.resize.add and there is not None:
            came_s.append(there.look.now - line.look.now)
    return {
        "requests": len(outcomes), "refused": sum(one.was_refused for one in outcomes), "failed": len(failed),
        "workers, most": max((len(line.look.members) for line in lines), default=0),
        "at the end": len(lines[-1].look.members) if lines else 0,
        "added": sum(len(line.plan.resize.add) for line in orders if line.plan.resize is not None),
        "removed": sum(bool(line.plan.resize.remove) for line in orders if line.plan.resize is not None),
        "there after, median s": f"{median(came_s):.1f}" if came_s else "-",
        "flips": sum(line.plan.flip is not None for line in lines),
    }  # fmt: skip


if __name__ == "__main__":
    main()
