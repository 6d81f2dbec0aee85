"""Runs: which of a transfer's blocks are there already, as ascending ranges with a gap between any two.

Blocks are counted in the order of engine.block_table.transfer_entries.
"""

from __future__ import annotations

from collections.abc import Iterable

Runs = tuple[range, ...]


def runs_of(numbers: Iterable[int]) -> Runs:
    """Of ascending numbers."""
    runs: list[range] = []
    for number in numbers:
        if runs and runs[-1].stop == number:
            runs[-1] = range(runs[-1].start, number + 1)
        else:
            runs.append(range(number, number + 1))
    return tuple(runs)


def gaps(runs: Runs, within: range) -> Runs:
    """What of a range is in none of the runs."""
    starts = (within.start, *(run.stop for run in runs))
    stops = (*(run.start for run in runs), within.stop)
    between = [range(max(a, within.start), min(b, within.stop)) for a, b in zip(starts, stops, strict=True)]
    return tuple([gap for gap in between if gap])
