"""How far a profile is: a bar on a terminal, elsewhere (a log, a pipe) one line for every part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from cluster.profiling.measure import Report


@contextmanager
def profile_progress(console: Console) -> Iterator[Report]:
    """What it yields is to be called with what is being measured and the share of the time that has passed."""
    if not console.is_terminal:
        yield lambda what, share: console.print(Text(f"{share:4.0%} {what}"), soft_wrap=True)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=1.0)
        yield lambda what, share: progress.update(task, description=what, completed=share)
