"""`python -m cluster.simulator.faults`: fault runs over many seeds, or one again. Exit codes:

0 nothing was found · 1 something was · 2 a flag or a file is wrong · 130 interrupted
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from cluster.simulator.faults.case import Case, load_case, to_json
from cluster.simulator.faults.cases import Cases
from cluster.simulator.faults.minimise import minimise
from cluster.simulator.faults.run import Outcome, run_case
from cluster.simulator.log import EventLog
from engine.errors import ConfigError

FOUND, WRONG_INPUT, INTERRUPTED = 1, 2, 130
COMMAND = "python -m cluster.simulator.faults"

Bug = Callable[[], AbstractContextManager[None]]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def main() -> None:
    logging.disable(logging.CRITICAL)  # workers are lost all the time here
    app(prog_name=COMMAND)


@dataclass(frozen=True, slots=True)
class Finding:
    """What a run found. `again` are the flags that repeat it."""

    case: Case
    outcome: Outcome
    again: str


@app.command()
def faults(
    runs: Annotated[int, typer.Option(min=1, help="how many runs, of successive seeds")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="the first seed")] = 0,
    bug: Annotated[str, typer.Option(metavar="MODULE:NAME", help="a context manager that plants a bug")] = "",
    minimised: Annotated[bool, typer.Option("--minimise", help="make what is found as small as possible")] = False,
    replay: Annotated[int | None, typer.Option(metavar="SEED", help="one run again")] = None,
    plan: Annotated[Path | None, typer.Option(metavar="FILE", help="run a case from a file that --save wrote")] = None,
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="write the first case found there")] = None,
    log: Annotated[Path | None, typer.Option(metavar="FILE", help="write the event log of --replay or --plan")] = None,
) -> None:
    """Hurt a simulated cluster in many ways, and see that it keeps its promises."""
    console = Console(file=sys.stdout)
    found: list[Finding] = []
    code = 0
    try:
        planted = _planted(bug)  # only while a case is run: which case a seed gives does not depend on it
        if plan is not None:
            found += _one(console, load_case(plan), f"--plan {plan}", log, planted)
        elif replay is not None:
            found += _one(console, Cases().of(replay), f"--replay {replay}", log, planted)
        else:
            code = _many(console, range(seed, seed + runs), planted, found)
        for index, finding in enumerate(found):
            with planted():
                _tell(console, finding, minimised, save if index == 0 else None, bug)
    except ConfigError as error:
        Console(stderr=True).print(Text.assemble(("error: ", "bold red"), error.message), soft_wrap=True)
        code = WRONG_INPUT
    except KeyboardInterrupt:
        console.print("interrupted")
        code = INTERRUPTED
    raise typer.Exit(code or (FOUND if found else 0))


def _one(console: Console, case: Case, again: str, log_file: Path | None, planted: Bug) -> list[Finding]:
    """A single run, told in full."""
    log = EventLog()
    with planted():
        outcome = run_case(case, log)
    if log_file is not None:
        log_file.write_bytes(log.to_bytes())
    ends = ", ".join(f"{name} {how}" for name, how in outcome.ends)
    console.print(f"{ends}\n{log.num_records} events, digest {outcome.digest}", soft_wrap=True, highlight=False)
    return [Finding(case, outcome, again)] if outcome.violation else []


def _many(console: Console, seeds: range, planted: Bug, found: list[Finding]) -> int:
    """Adds to `found`. Ctrl-C ends it early: what was found until then is told, and the exit code says so."""
    cases, num_run, code = Cases(), 0, 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("fault runs", total=len(seeds))
        try:
            for seed in seeds:
                case = cases.of(seed)
                with planted():
                    outcome = run_case(case)
                if outcome.violation is not None:
                    found.append(Finding(case, outcome, f"--replay {seed}"))
                num_run += 1
                progress.update(task, advance=1, description=f"fault runs, {len(found)} failed")
        except KeyboardInterrupt:
            code = INTERRUPTED
    console.print(f"{num_run} runs, {len(found)} failed{', then interrupted' if code else ''}")
    return code


def _tell(console: Console, finding: Finding, minimised: bool, save: Path | None, bug: str) -> None:
    violation = finding.outcome.violation
    assert violation is not None
    console.print(Text.assemble((str(violation), "bold red")), soft_wrap=True)
    case, again = finding.case, finding.again
    if minimised:
        with console.status("making it smaller"):
            case = minimise(case, violation.invariant)
    if save is not None:
        save.write_text(to_json(case))
        again = f"--plan {save}"
    for line in (*case.scenario.requests, *case.plan) if minimised else case.plan:
        console.print(f"  {line}", soft_wrap=True, highlight=False)
    planted = f" --bug {bug}" if bug else ""
    hint = " (as it was; --save FILE keeps the small one)" if minimised and save is None else ""
    console.print(f"  again: {COMMAND} {again}{planted}{hint}", soft_wrap=True, highlight=False)


def _planted(bug: str) -> Bug:
    """Raises ConfigError when it names no such thing."""
    if not bug:
        return nullcontext
    module, _, name = bug.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        raise ConfigError(f"--bug {bug}: no such context manager; it is MODULE:NAME") from None
