"""How far a pull is: a bar on a terminal, elsewhere (a log, a pipe) one line for every tenth of a stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

ReportProgress = Callable[[str, int, int], None]
_NUM_LINES = 10  # of a stage


def share(stage: str, done: int, total: int) -> str:
    """`done` of `total` bytes, in words; a total of 0 is unknown."""
    return f"{stage} {done / 2**20:.0f} of {total / 2**20:.0f} MiB" if total else stage


@contextmanager
def pull_progress(console: Console) -> Iterator[ReportProgress]:
    """What it yields is to be called with a stage, and how much of how much is done, in bytes."""
    if not console.is_terminal:
        yield _lines(console)
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        shown = ""

        def report(stage: str, done: int, total: int) -> None:
            nonlocal shown
            if stage != shown:  # a stage may begin with what an earlier pull has left, which is no speed of this one
                shown = stage
                progress.reset(task, description=stage, completed=done, total=total or None)
            progress.update(task, completed=done)

        yield report


def _lines(console: Console) -> ReportProgress:
    told: tuple[str, int] | None = None

    def report(stage: str, done: int, total: int) -> None:
        nonlocal told
        now = (stage, _NUM_LINES * done // total if total else 0)
        if now != told:
            told = now
            console.print(Text(share(stage, done, total)), soft_wrap=True)

    return report
