"""Flips of live workers: a load that swings from long prompts to long answers makes the controller flip them.

    python -m benchmarks.flip [--quick] [--show] [--json FILE]

1. Two prefill and two decode workers of the default model on this machine, float32, greedy. Every prompt is answered
   once while the cluster is idle;
2. long prompts with short answers come, then short prompts with long answers, and so on (open loop, Poisson);
3. every answer must be complete and the very one of before, whatever changed its pool meanwhile (the golden law);
4. the controller's journal says when it flipped whom, and how long that took from the decision until it was listed.
TPOT during a flip is that of tokens that came between its decision and a second after its end; the usual one is that of
all other tokens. `--show` draws the pools as they change: `make demo-flip`. Also timed, without a cluster:
one decision for 1,000 workers.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import numpy as np

from benchmarks.open_loop import Arrival, Outcome, Prompt, play, schedule
from benchmarks.report import Row, Target, machine, median, print_table, print_targets, target, write_json
from benchmarks.serve import Cluster
from benchmarks.slo import served_model
from benchmarks.texts import prompt_texts
from cluster.control.flip import Flipped
from cluster.control.journal import Line
from cluster.control.planner import Memory, plan
from cluster.control.rules import ControllerConfig
from cluster.control.seen import Seen
from cluster.explain import read_lines
from engine.types import Role
from router.arrivals import Arrived
from router.report import StepTable, WorkerStand

TTFT_S, TPOT_S = 4.0, 0.15
LONG_CHARS, SHORT_CHARS = 1600, 60
SHORT_ANSWER, LONG_ANSWER = (2, 4), (60, 80)
PROMPT_RATE, ANSWER_RATE = 2.0, 5.0  # requests/s
PHASE_S, NUM_PHASES = 45.0, 3
SETTLES_S = 1.0
RULES: dict[str, object] = {
    "window_s": 20.0, "bucket_s": 2.0, "horizon_s": 30.0, "fewest": 8, "confirmations": 2, "cooldown_s": 8.0,
    "recent_s": 6.0, "together": False,
}  # fmt: skip
NUM_DECIDED, NUM_WORKERS = 20, 1000


@dataclass(frozen=True, slots=True)
class Change:
    """A flip that was done; times on this process's clock."""

    begun_s: float
    ended_s: float
    done: Flipped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two short phases, without a judgement")
    parser.add_argument("--show", action="store_true", help="draw the pools while they change")
    parser.add_argument("--json", metavar="FILE", help="write rows and targets there too")
    options = parser.parse_args()
    phase_s, num_phases = (20.0, 1) if options.quick else (PHASE_S, NUM_PHASES)
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "journal.jsonl"
        with cluster_of(journal, 2, {}) as cluster:
            outcomes = asyncio.run(_play(cluster.url, phase_s, num_phases, options.show))
        changes = _changes(list(read_lines(journal)))
    rows, targets = _judge(outcomes, changes)
    print_table(f"2 + 2 workers, float32; {machine()}", rows)
    decision_ms = decide_ms()
    print(f"one decision for {NUM_WORKERS} workers: {decision_ms:.1f} ms")
    targets.append(target("flip", "decision for 1,000 workers, ms", decision_ms))
    targets = [] if options.quick else targets
    print_targets(targets)
    write_json(options.json, rows, targets)


def cluster_of(journal: Path, workers: int, rules: dict[str, object]) -> Cluster:
    """So many workers of each pool."""
    share: dict[str, object] = {"workers": workers, "num_cpus": 0.5}
    return Cluster(
        {"prefix_cache": False, "num_blocks": 1024},
        router={"policy": "slo", "ttft_s": TTFT_S, "tpot_s": TPOT_S, "canary_s": 120},
        controller=RULES | rules | {"journal_file": str(journal)},
        pools={"prefill": share, "decode": share},
    )


# --- the load ------------------------------------------------------------------------------------------------


async def _play(url: str, phase_s: float, num_phases: int, shows: bool) -> list[Outcome]:
    model = await served_model(url)
    long, short = prompts()
    answers = await unloaded(url, model, [*long, *short])
    arrivals = list[Arrival]()
    for phase in range(num_phases):
        heavy = phase % 2 == 0
        found = schedule(
            long if heavy else short, PROMPT_RATE if heavy else ANSWER_RATE, phase_s,
            SHORT_ANSWER if heavy else LONG_ANSWER, seed=phase,
        )  # fmt: skip
        arrivals += [replace(one, at_s=one.at_s + phase * phase_s) for one in found]
    showing = asyncio.create_task(show(url)) if shows else None
    outcomes = await play(url, model, arrivals)
    if showing is not None:
        showing.cancel()
    require_same(outcomes, answers)
    return outcomes


def require_same(outcomes: Sequence[Outcome], answers: dict[int, str]) -> None:
    """The golden law."""
    for one in outcomes:
        expected = answers[one.arrival.prompt.number]
        if one.is_whole and not expected.startswith(one.text.rstrip("\ufffd")):
            raise SystemExit(f"wrong: {one.text!r} where {expected!r} was answered before")


def prompts() -> tuple[list[Prompt], list[Prompt]]:
    """Long ones and short ones."""
    texts, _ = prompt_texts(12, LONG_CHARS)
    made = [Prompt(number, text, TTFT_S, TPOT_S) for number, text in enumerate(texts)]
    return made[:6], [replace(one, text=one.text[:SHORT_CHARS]) for one in made[6:]]


async def unloaded(url: str, model: str, asked: Sequence[Prompt]) -> dict[int, str]:
    """What each is answered while nothing else is served."""
    answers: dict[int, str] = {}
    for one in asked:
        most = SHORT_ANSWER[1] if len(one.text) > SHORT_CHARS else LONG_ANSWER[1]
        *_, outcome = await play(url, model, [Arrival(0, one, most)], max_tries=20)  # calibrations may still be off
        if not outcome.is_whole:
            raise SystemExit(f"wrong: an unloaded answer ended with {outcome.status}")
        answers[one.number] = outcome.text
    return answers


async def show(url: str) -> None:
    """A line whenever a pool has changed."""
    before, begun = "", time.perf_counter()
    async with httpx.AsyncClient(base_url=url) as client:
        while True:
            workers = (await client.get("/health")).json()["workers"]
            pools = "  ".join(f"{one['worker_id']} {one['role'].upper():<8}" for one in workers)
            if pools != before:
                print(f"{time.perf_counter() - begun:6.1f} s  {pools}", flush=True)
                before = pools
            await asyncio.sleep(0.2)


# --- what came of it ------------------------------------------------------------------------------------------


def _changes(lines: Sequence[Line]) -> list[Change]:
    """Of flips that were decided upon; their ends are in a later line."""
    changes, decided = list[Change](), list[Line]()
    for line in lines:
        for done in line.flipped:
            begun = decided.pop(0).look.now if decided else line.look.now - done.listed_s
            if not done.problem:
                changes.append(Change(begun, begun + done.listed_s, done))
        if line.plan.flip is not None:
            decided.append(line)
    return changes


def _judge(outcomes: Sequence[Outcome], changes: Sequence[Change]) -> tuple[list[Row], list[Target]]:
    failed = failures(outcomes)
    refused = sum(one.was_refused for one in outcomes)
    steps, in_flip = list[float](), list[float]()
    for one in outcomes:
        for before, after in zip(one.token_times, one.token_times[1:], strict=False):
            (in_flip if _is_within(after, changes) else steps).append(after - before)
    usual, during = (1e3 * float(np.quantile(some, 0.9)) if some else float("nan") for some in (steps, in_flip))
    listed = [one.done.listed_s for one in changes]
    row: Row = {
        "requests": len(outcomes), "refused": refused, "failed": len(failed), "flips": len(changes),
        "listed after, median s": f"{median(listed):.3f}", "most s": f"{max(listed, default=float('nan')):.3f}",
        "sequences that stayed": sum(one.done.num_left for one in changes), "P90 TPOT ms": f"{usual:.0f}",
        "in flips": f"{during:.0f} of {len(in_flip)} tokens",
    }  # fmt: skip
    return [row], [
        target("flip", "flips", len(changes)),
        target("flip", "listed after, median s", median(listed)),
        target("flip", "P90 TPOT in flips over its usual", during / usual),
        target("flip", "failed requests", len(failed)),
    ]


def failures(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Told, too. A request that was refused has not failed."""
    failed = [one for one in outcomes if one.status not in (200, 429) or (one.status == 200 and not one.is_whole)]
    for one in failed:
        print(
            f"failed: status {one.status}, {one.num_tokens} of {one.arrival.num_tokens} tokens, at {one.sent_s:.1f} s: "
            f"{one.error}"
        )
    return failed


def _is_within(at_s: float, changes: Sequence[Change]) -> bool:
    """The loop's clock and ours are the same: CLOCK_MONOTONIC of one machine."""
    return any(one.begun_s <= at_s <= one.ended_s + SETTLES_S for one in changes)


def decide_ms() -> float:
    """The median time of one decision for many workers, under a load that calls for a flip."""
    look, memory, times_s = _many(), Memory(), list[float]()
    for _ in range(NUM_DECIDED):
        begun = time.perf_counter()
        decided, _ = plan(look, memory, ControllerConfig())
        times_s.append(time.perf_counter() - begun)
        if decided.best is None or decided.now is None or decided.best.num_prefill <= decided.now.num_prefill:
            raise SystemExit(f"wrong: long prompts call for prefill workers, and it said: {decided.reason}")
    return 1e3 * median(times_s)


def _many() -> Seen:
    """A minute of long prompts with short answers, more than those who prefill and the slack of the others can
    compute."""
    workers = tuple(
        WorkerStand(f"w{n}", "life", "c", Role.DECODE if n % 2 else Role.PREFILL, 0, True, 0.0, 1, 100.0, 4096, 4096, 0)
        for n in range(NUM_WORKERS)
    )
    count = round(60 * 1.15 * NUM_WORKERS)
    arrived = tuple(Arrived(40 + 60 * n / count, 8000, 0, 10.0, 0.8, 3.0, 0.05) for n in range(count))
    table = StepTable((1, 128), (64, 65536), ((0.01, 0.012), (0.03, 0.05)))
    return Seen(100.0, 100.0, arrived, (), workers, (("c", table),), 1e-7, 16, 128)


if __name__ == "__main__":
    main()
