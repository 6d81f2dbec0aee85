"""`steelyard explain`: the controller's journal, decision by decision, each made again from what it was made from."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.control.journal import Line, Replayed, decode, replay
from cluster.control.planner import Plan
from cluster.control.sizing import Split
from engine.errors import ConfigError


def run_explain(path: Path, console: Console, *, flips_only: bool) -> bool:
    """Are all decisions the same when they are made again? Raises ConfigError for what is no journal."""
    replayed = list(replay(read_lines(path)))
    if not replayed:
        raise ConfigError(f"{path}: no line says what was remembered; the beginning of the journal is missing")
    _print(replayed, console, flips_only)
    others = [one for one in replayed if not one.is_same]
    console.print(f"{len(replayed)} decisions, made again: {len(others) or 'none'} came out otherwise")
    for one in others[:10]:
        console.print(f"  at {one.line.look.now:.1f} s: {one.line.plan.reason!r} then, {one.again.reason!r} now")
    return not others


def read_lines(path: Path) -> Iterator[Line]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    yield decode(text, f"{path}, line {number}: ")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def _print(replayed: list[Replayed], console: Console, flips_only: bool) -> None:
    """What stayed the same for a while is one row."""
    table = Table(title="What the controller decided, and why", title_justify="left")
    for name in ("at s", "ticks", "requests/s", "P + D", "kept", "best", "would keep", "decision"):
        table.add_column(name, justify="left" if name == "decision" else "right")
    begun = replayed[0].line.look.now
    for _, group in groupby(replayed, key=lambda one: _alike(one.line.plan)):
        same = list(group)
        for done in (done for one in same for done in one.line.flipped):
            took = f"listed as {done.role} after {done.listed_s:.2f} s, {done.num_left} requests stayed"
            told = f"{done.worker_id}: {done.problem or took}"
            table.add_row(f"{same[0].line.look.now - begun:.1f}", "", "", "", "", "", "", told)
        first = same[0].line.plan
        if flips_only and first.flip is None and first.resize is None:
            continue
        table.add_row(
            f"{same[0].line.look.now - begun:.1f}", str(len(same)), f"{first.rate:.2f}", _named(first.now),
            _kept(first.now), _named(first.best), _kept(first.best), _told(first),
        )  # fmt: skip
    console.print(table)


def _alike(plan: Plan) -> tuple[str, str, str]:
    changes = plan.flip is not None or plan.resize is not None
    reason = plan.reason if changes else plan.reason.split(":")[1].split(" of ")[0]
    return reason.strip().rstrip("0123456789. "), _named(plan.now), _named(plan.best)


def _named(split: Split | None) -> str:
    return f"{split.num_prefill} + {split.num_decode}" if split is not None else "-"


def _kept(split: Split | None) -> str:
    return f"{split.attained:.1%}" if split is not None else "-"


def _told(plan: Plan) -> str:
    if plan.flip is None:
        return plan.reason  # which says who comes or leaves, if somebody does
    flip = plan.flip
    return f"{plan.reason}: {flip.worker_id} to {flip.to}, gain {flip.gain:.2f}, cost {flip.cost:.2f} requests"
