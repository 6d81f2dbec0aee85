"""Rows of measured points: linear along each row and between neighbouring rows, hence bilinear on a grid.

Rows may have points of their own, as measurements of a real engine do. Beyond the points a given function goes on from
the nearest edge, so that there is no jump.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from statistics import median

import numpy as np

Point = tuple[float, float, float]  # row, along, value
MANY = 16  # from so many on numpy is faster


def lines_of(points: Iterable[Point]) -> dict[float, dict[float, float]]:
    """By row, by place along it, both rising: the value, the median where there are several."""
    found: dict[float, dict[float, list[float]]] = {}
    for row, along, value in points:
        found.setdefault(row, {}).setdefault(along, []).append(value)
    return {row: {along: median(found[row][along]) for along in sorted(found[row])} for row in sorted(found)}


class Rows:
    """`beyond(row, along)`: only its differences count; without it everything stays as it is at the edge."""

    def __init__(self, points: Iterable[Point], beyond: Callable[[float, float], float] | None = None) -> None:
        lines = lines_of(points)
        assert lines, "no points"
        self._rows = list(lines)
        self._along = [list(line) for line in lines.values()]
        self._values = [list(line.values()) for line in lines.values()]
        self._beyond = beyond
        self._grid = _Grid(self._rows, self._along[0], self._values) if _is_grid(self._along) else None

    def at_each(self, rows: np.ndarray, along: np.ndarray) -> list[float]:
        """`at` of each pair, bit for bit."""
        if self._grid is not None and len(rows) >= MANY:
            found = self._grid.at_each(rows, along)
            if found is not None:
                return found.tolist()
        return [self.at(*pair) for pair in zip(rows.tolist(), along.tolist(), strict=True)]

    def at(self, row: float, along: float) -> float:
        rows = self._rows
        above = bisect_right(rows, row)
        if 0 < above < len(rows):
            below = above - 1
            part = (row - rows[below]) / (rows[above] - rows[below])
            return self._in_row(below, along) * (1.0 - part) + self._in_row(above, along) * part
        edge = above - 1 if above else 0
        value = self._in_row(edge, along)
        if rows[edge] == row or self._beyond is None:
            return value
        return value + self._beyond(row, along) - self._beyond(rows[edge], along)

    def covers(self, row: float, along: float) -> bool:
        """Is this between measured points? Between two rows, the lines from end to end are the border."""
        rows = self._rows
        if not rows[0] <= row <= rows[-1]:
            return False
        above = min(bisect_right(rows, row), len(rows) - 1)
        below = max(0, above - 1)
        part = (row - rows[below]) / (rows[above] - rows[below]) if above > below else 0.0
        first, last = ((1.0 - part) * self._along[below][end] + part * self._along[above][end] for end in (0, -1))
        return first <= along <= last

    def _in_row(self, index: int, along: float) -> float:
        points, values = self._along[index], self._values[index]
        above = bisect_right(points, along)
        if 0 < above < len(points):
            below = above - 1
            part = (along - points[below]) / (points[above] - points[below])
            return values[below] * (1.0 - part) + values[above] * part
        edge = above - 1 if above else 0
        if points[edge] == along or self._beyond is None:
            return values[edge]
        row = self._rows[index]
        return values[edge] + self._beyond(row, along) - self._beyond(row, points[edge])


class _Grid:
    """The same for many at a time, where all rows have the same points."""

    def __init__(self, rows: list[float], along: list[float], values: list[list[float]]) -> None:
        self._rows, self._along, self._values = np.array(rows), np.array(along), np.array(values)

    def at_each(self, rows: np.ndarray, along: np.ndarray) -> np.ndarray | None:
        """None if any is not inside. The operations are those of Rows.at, in its order."""
        above_row = np.searchsorted(self._rows, rows, side="right")
        above = np.searchsorted(self._along, along, side="right")
        if not (_all_inside(above_row, self._rows) and _all_inside(above, self._along)):
            return None
        below_row, below = above_row - 1, above - 1
        down = (rows - self._rows[below_row]) / (self._rows[above_row] - self._rows[below_row])
        right = (along - self._along[below]) / (self._along[above] - self._along[below])
        upper = self._values[below_row, below] * (1.0 - right) + self._values[below_row, above] * right
        lower = self._values[above_row, below] * (1.0 - right) + self._values[above_row, above] * right
        return upper * (1.0 - down) + lower * down


def _is_grid(along: list[list[float]]) -> bool:
    return len(along) > 1 and len(along[0]) > 1 and all(points == along[0] for points in along)


def _all_inside(above: np.ndarray, points: np.ndarray) -> bool:
    return bool(above.min() > 0 and above.max() < len(points))
