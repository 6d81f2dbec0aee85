"""Do fault runs find bugs? 2,000 of them, with each of ten planted bugs, and with none.

    python -m benchmarks.faults [--quick] [--once] [--runs N] [--json FILE]

Run n is the same case for all: a small scenario and the faults in it, both drawn from n (one run in eight has none). It
counts as found when any invariant is violated; the run without a planted bug must violate none. With --once, and
--quick, a bug that was found is not looked for any more.
"""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field

from rich.progress import Progress

from benchmarks.planted_bugs import PLANTED
from benchmarks.report import Row, machine, print_table, print_targets, target, write_json
from cluster.simulator.faults.cases import Cases
from cluster.simulator.faults.invariants import Violation
from cluster.simulator.faults.run import run_case

NUM_RUNS, NUM_QUICK_RUNS = 2000, 240
NONE = "none"


@dataclass(slots=True)
class Tally:
    """What runs with one bug found."""

    first: int | None = None  # the number of the run
    by_invariant: Counter[str] = field(default_factory=Counter)

    def row(self, bug: str) -> Row:
        most = [f"{name} ({count})" for name, count in self.by_invariant.most_common(3)]
        first = "-" if self.first is None else self.first
        return {"bug": bug, "first found by run": first, "found by": self.num_found, "invariants": ", ".join(most)}

    def note(self, seed: int, violation: Violation | None) -> None:
        if violation is not None:
            self.first = seed if self.first is None else self.first
            self.by_invariant[violation.invariant] += 1

    @property
    def num_found(self) -> int:
        return self.by_invariant.total()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{NUM_QUICK_RUNS} runs, of each bug until it is found")
    parser.add_argument("--once", action="store_true", help="look for each bug until it is found")
    parser.add_argument("--runs", type=int, default=NUM_RUNS, help="runs each")
    parser.add_argument("--json", metavar="FILE", help="write rows and targets there too")
    options = parser.parse_args()
    num_runs = min(options.runs, NUM_QUICK_RUNS) if options.quick else options.runs
    logging.disable(logging.CRITICAL)
    tallies = measure(num_runs, once=options.quick or options.once)
    rows = [tally.row(bug) for bug, tally in tallies.items()]
    print_table(f"{num_runs} fault runs with each planted bug; {machine()}", rows)
    num_bugs = sum(tally.num_found > 0 for bug, tally in tallies.items() if bug != NONE)
    targets = [
        target("faults", "planted_bugs_found", num_bugs),
        target("faults", "runs_that_found_something_without_one", tallies[NONE].num_found),
    ]
    print_targets(targets)
    write_json(options.json, rows, targets)


def measure(num_runs: int, once: bool) -> dict[str, Tally]:
    """By the name of the bug. With `once` each is looked for until it is found."""
    cases = Cases()
    bugs = {NONE: nullcontext, **PLANTED}
    tallies = {bug: Tally() for bug in bugs}
    with Progress() as progress:
        task = progress.add_task("fault runs", total=num_runs * len(bugs))
        for seed in range(num_runs):
            case = cases.of(seed)
            for bug, planted in bugs.items():
                if not (once and bug != NONE and tallies[bug].num_found):
                    with planted():
                        tallies[bug].note(seed, run_case(case).violation)
                progress.advance(task)
    return tallies


if __name__ == "__main__":
    main()
