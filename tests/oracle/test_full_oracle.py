"""`make test-oracle`: forty prompts over all combinations, and through a cluster; writes results.json.

1. Each combination runs in one of several processes of one thread each; of a long prompt small chunks are tried only in
   company (`longest_prompt`), because they cost a step of the whole model for a few tokens.
2. The forty also go through a cluster, one at a time and sixteen at a time.
3. results.json is written after each of them. A run that was stopped goes on where it stopped, as long as it is of the
   same versions; one that was finished starts anew. The test fails if anything is wrong or missing in the end.

ORACLE_PROMPTS=3 in the environment tries it with so few prompts, and writes nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

from engine.planes import NUMERICS_VERSION
from tests.cluster.harness import local_cluster
from tests.oracle.clients import check_cluster
from tests.oracle.combinations import (
    WHOLE,
    Case,
    Combination,
    Tally,
    all_combinations,
    check_engine,
    fitting,
    processes,
)
from tests.oracle.prompts import MODEL, NUM_PROMPTS, oracle_prompts, source
from tests.oracle.record import versions
from tests.oracle.reference import NUM_NEW, golden

pytestmark = [pytest.mark.oracle, pytest.mark.timeout(0)]

RESULTS_PATH = Path(__file__).with_name("results.json")
LONGEST = {(1, 1): 130, (1, 4): 420, (7, 1): 420}  # tokens of a prompt, by chunk and batch
AT_ONCE = (1, 16)  # through the cluster


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    where: str
    num_compared: int
    num_equal: int
    num_near_ties: int
    num_wrong: int
    num_left_out: int  # prompts too long for it
    duration_s: float

    def __str__(self) -> str:
        return (
            f"{self.where:62} {self.num_compared:8} {self.num_equal:6} {self.num_near_ties:9} {self.num_wrong:6} "
            f"{self.num_left_out:9} {self.duration_s:7.1f}"
        )


Add = Callable[[str, Tally, float], None]  # where, what came of it, seconds
HEADER = f"{'':62} {'compared':>8} {'equal':>6} {'near ties':>9} {'wrong':>6} {'left out':>9} {'seconds':>7}"


@dataclass(slots=True)
class Report:
    """The table so far. `known` are the rows of a run that was stopped."""

    rows: list[Row] = field(default_factory=list)
    near_ties: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def add(self, where: str, tally: Tally, num_prompts: int, duration_s: float) -> Row:
        left_out = num_prompts - tally.num_compared
        counts = (tally.num_compared, tally.num_equal, len(tally.near_ties), len(tally.wrong))
        self.rows.append(Row(where, *counts, left_out, round(duration_s, 1)))
        self.near_ties += tally.near_ties
        self.wrong += tally.wrong
        return self.rows[-1]

    def has(self, where: str) -> bool:
        return any(row.where == where for row in self.rows)

    def missing(self) -> list[str]:
        return [where for where in EVERYWHERE if not self.has(where)]

    def __str__(self) -> str:
        equal, compared = sum(row.num_equal for row in self.rows), sum(row.num_compared for row in self.rows)
        return "\n".join([f"{equal} of {compared} equal", *self.near_ties, *self.wrong])


# Those in which the block order goes with the prefix cache come first: they hold every pair of the other factors.
COMBINATIONS = sorted(
    all_combinations(block_size=16), key=lambda one: (one.shuffled != one.prefix_cache, -one.batch, one.chunk)
)
EVERYWHERE = [*map(str, COMBINATIONS), *(f"cluster, {count} at once" for count in AT_ONCE)]


def longest_prompt(one: Combination) -> int:
    return LONGEST.get((one.chunk, one.batch), WHOLE)


def cases(count: int) -> list[Case]:
    """Longest first: a prompt that is computed in small chunks then has company to its end."""
    return [Case(prompt, golden().expected(prompt.ids)) for prompt in reversed(oracle_prompts(count))]


# --- the run --------------------------------------------------------------------------------------------------


async def test_forty_prompts_over_all_combinations(capfd: pytest.CaptureFixture[str]):
    count = int(os.environ.get("ORACLE_PROMPTS", NUM_PROMPTS))
    is_whole = count == NUM_PROMPTS
    report, begun = _stopped_run() if is_whole else Report(), time.perf_counter()

    def show(text: object) -> None:
        with capfd.disabled():
            print(f"{time.perf_counter() - begun:6.0f} s  {text}", flush=True)

    def add(where: str, tally: Tally, duration_s: float) -> None:
        show(report.add(where, tally, count, duration_s))
        if is_whole:
            RESULTS_PATH.write_text(_as_json(report), "utf-8")

    show(f"{count} prompts: {source()}; {len(report.missing())} of {len(EVERYWHERE)} rows to do")
    show(HEADER)
    await _run_engines(count, report, [one for one in COMBINATIONS[: len(COMBINATIONS) // 2] if one.batch > 1], add)
    await _run_cluster(count, report, add)
    await _run_engines(count, report, COMBINATIONS, add)
    show(report)
    assert not report.wrong, str(report)
    assert not report.missing()


async def _run_engines(count: int, report: Report, combinations: Sequence[Combination], add: Add) -> None:
    loop = asyncio.get_running_loop()
    with processes() as pool:

        async def check(one: Combination) -> None:
            chosen = fitting(cases(count), longest_prompt(one))
            tally, _, duration_s = await loop.run_in_executor(pool, check_engine, one, chosen)
            add(str(one), tally, duration_s)

        async with asyncio.TaskGroup() as group:
            for one in combinations:
                if not report.has(str(one)):
                    group.create_task(check(one))


async def _run_cluster(count: int, report: Report, add: Add) -> None:
    wanted = {f"cluster, {at_once} at once": at_once for at_once in AT_ONCE}
    if all(map(report.has, wanted)):
        return
    async with local_cluster() as cluster:
        for where, at_once in wanted.items():
            begun = time.perf_counter()
            if not report.has(where):
                add(where, await check_cluster(cluster, cases(count), at_once), time.perf_counter() - begun)


def _stopped_run() -> Report:
    """What an earlier run of the same versions left undone; empty if there is none."""
    if not RESULTS_PATH.exists():
        return Report()
    stored = json.loads(RESULTS_PATH.read_text("utf-8"))
    report = Report([Row(**row) for row in stored["rows"]], stored["near_ties"], stored["wrong"])
    is_same = (stored["numerics_version"], stored["versions"]) == (NUMERICS_VERSION, versions())
    return report if is_same and report.missing() and not report.wrong else Report()


def _as_json(report: Report) -> str:
    lengths = [len(prompt.ids) for prompt in oracle_prompts(NUM_PROMPTS)]
    limits = ", ".join(f"chunk {chunk} at batch {batch}: {longest}" for (chunk, batch), longest in LONGEST.items())
    head = {
        "model": MODEL, "numerics_version": NUMERICS_VERSION, "versions": versions(), "cores": os.cpu_count(),
        "prompts": {"source": source(), "count": len(lengths), "tokens": [min(lengths), max(lengths)]},
        "num_new": NUM_NEW, "num_compared": sum(row.num_compared for row in report.rows),
        "num_equal": sum(row.num_equal for row in report.rows), "near_ties": report.near_ties, "wrong": report.wrong,
        "left_out": f"prompts of more tokens than, with {limits}", "not_run_yet": report.missing(),
    }  # fmt: skip
    rows = sorted(report.rows, key=lambda row: row.where)
    lines = ",\n".join(f"  {json.dumps(asdict(row))}" for row in rows)
    return json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n'
