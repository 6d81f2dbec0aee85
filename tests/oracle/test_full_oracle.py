"""`make test-oracle`: forty prompts over all combinations, and through a cluster; writes results.json.

1. Each combination runs in a process of its own thread, as many at a time as there are cores. With a chunk of one token
   a prompt costs a step of the whole model for each token, so long ones have that only in company (`longest_prompt`).
2. Then the forty go through a cluster, one at a time and sixteen at a time.
3. The table is printed as it grows; the result is written even if something is wrong, and the test fails then.

ORACLE_PROMPTS=3 in the environment tries it with so few prompts, and writes nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable
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

pytestmark = pytest.mark.oracle

RESULTS_PATH = Path(__file__).with_name("results.json")
LONGEST_WITH_CHUNK_1 = {1: 130, 4: 420}  # tokens of a prompt, by batch
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


HEADER = f"{'':62} {'compared':>8} {'equal':>6} {'near ties':>9} {'wrong':>6} {'left out':>9} {'seconds':>7}"


@dataclass(slots=True)
class Report:
    rows: list[Row] = field(default_factory=list)
    total: Tally = field(default_factory=Tally)

    def add(self, where: str, tally: Tally, num_prompts: int, duration_s: float) -> Row:
        left_out = num_prompts - tally.num_compared
        counts = (tally.num_compared, tally.num_equal, len(tally.near_ties), len(tally.wrong))
        self.rows.append(Row(where, *counts, left_out, round(duration_s, 1)))
        self.total.add(tally)
        return self.rows[-1]


def longest_prompt(one: Combination) -> int:
    return LONGEST_WITH_CHUNK_1.get(one.batch, WHOLE) if one.chunk == 1 else WHOLE


def cases(count: int) -> list[Case]:
    """Longest first: a prompt that is computed in small chunks then has company to its end."""
    return [Case(prompt, golden().expected(prompt.ids)) for prompt in reversed(oracle_prompts(count))]


# --- the run --------------------------------------------------------------------------------------------------


async def test_forty_prompts_over_all_combinations(capfd: pytest.CaptureFixture[str]):
    count = int(os.environ.get("ORACLE_PROMPTS", NUM_PROMPTS))
    report, begun = Report(), time.perf_counter()

    def show(text: object) -> None:
        with capfd.disabled():
            print(f"{time.perf_counter() - begun:6.0f} s  {text}", flush=True)

    show(f"{count} prompts: {source()}")
    show(HEADER)
    await _run_engines(count, report, show)
    await _run_cluster(count, report, show)
    show(report.total)
    if count == NUM_PROMPTS:
        RESULTS_PATH.write_text(_as_json(report, time.perf_counter() - begun), "utf-8")
    assert not report.total.wrong, str(report.total)


async def _run_engines(count: int, report: Report, show: Callable[[object], None]) -> None:
    loop = asyncio.get_running_loop()
    with processes() as pool:

        async def check(one: Combination) -> None:
            chosen = fitting(cases(count), longest_prompt(one))
            tally, _, duration_s = await loop.run_in_executor(pool, check_engine, one, chosen)
            show(report.add(str(one), tally, count, duration_s))

        longest_first = sorted(all_combinations(block_size=16), key=lambda one: (one.batch, one.chunk))
        async with asyncio.TaskGroup() as group:
            for one in longest_first:
                group.create_task(check(one))


async def _run_cluster(count: int, report: Report, show: Callable[[object], None]) -> None:
    async with local_cluster() as cluster:
        for at_once in AT_ONCE:
            begun = time.perf_counter()
            tally = await check_cluster(cluster, cases(count), at_once)
            show(report.add(f"cluster, {at_once} at once", tally, count, time.perf_counter() - begun))


def _as_json(report: Report, duration_s: float) -> str:
    lengths = [len(prompt.ids) for prompt in oracle_prompts(NUM_PROMPTS)]
    head = {
        "model": MODEL, "numerics_version": NUMERICS_VERSION, "versions": versions(), "cores": os.cpu_count(),
        "prompts": {"source": source(), "count": len(lengths), "tokens": [min(lengths), max(lengths)]},
        "num_new": NUM_NEW, "duration_s": round(duration_s), "num_compared": report.total.num_compared,
        "num_equal": report.total.num_equal, "near_ties": report.total.near_ties, "wrong": report.total.wrong,
        "left_out": f"chunk 1: prompts of more tokens than, by batch, {LONGEST_WITH_CHUNK_1}",
    }  # fmt: skip
    rows = sorted(report.rows, key=lambda row: row.where)
    lines = ",\n".join(f"  {json.dumps(asdict(row))}" for row in rows)
    return json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n'
