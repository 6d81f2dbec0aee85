"""Axes and colours that all plots of a report share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from cluster.simulator.results import Happening

AxisOptions = dict[str, object]  # plotly's

ROLE_COLOURS = {"prefill": "#2563eb", "decode": "#ea7317"}
OTHER_COLOUR = "#64748b"  # of a role that has none, and of what has no role
QUANTILE_COLOURS = {"P50": "#0f766e", "P90": "#b45309", "P99": "#be123c"}
TARGET_COLOUR = "#111827"
MARK_COLOUR = "#94a3b8"
GRID_COLOUR = "#e5e9f0"
SHARES: AxisOptions = {"tickformat": ".0%", "range": [0, 1.03]}
MAX_MARKS = 60  # happenings shown as lines; beyond, they would hide what they explain


@dataclass(frozen=True, slots=True)
class Unit:
    """`name`: for an axis; `per`: how many of the base unit (seconds) one is."""

    name: str
    per: float

    def of(self, values: Iterable[float | None]) -> list[float | None]:
        return [None if value is None else value / self.per for value in values]


SECONDS, MINUTES, HOURS, MILLISECONDS = Unit("s", 1.0), Unit("min", 60.0), Unit("h", 3600.0), Unit("ms", 1e-3)


def time_unit(span_s: float) -> Unit:
    """In which a span of time has few digits."""
    if span_s <= 300:
        return SECONDS
    return MINUTES if span_s <= 3 * 3600 else HOURS


def latency_unit(longest_s: float) -> Unit:
    return SECONDS if longest_s > 5 else MILLISECONDS


@dataclass(frozen=True, slots=True)
class TimeAxis:
    """The x axis of everything that goes on over time, with the happenings as dotted lines."""

    unit: Unit
    span_s: float
    marks: tuple[Happening, ...]

    def plot(self, y_title: str, y_axis: AxisOptions | None = None) -> go.Figure:
        figure = plain_figure(f"virtual time ({self.unit.name})", y_title, y_axis)
        figure.update_xaxes(range=[0, self.span_s / self.unit.per])
        figure.update_layout(hovermode="x unified")
        for mark in self.marks[:MAX_MARKS]:
            line = {"color": MARK_COLOUR, "width": 1, "dash": "dot"}
            figure.add_vline(mark.at_s / self.unit.per, line=line, layer="below")
        return figure


def time_axis(span_s: float, happenings: Sequence[Happening]) -> TimeAxis:
    """The workers that are there from the beginning are no marks."""
    marks = tuple(happening for happening in happenings if happening.at_s > 0)
    return TimeAxis(time_unit(span_s), span_s, marks)


def plain_figure(x_title: str, y_title: str, y_axis: AxisOptions | None = None) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        template="none", height=300, margin={"l": 62, "r": 16, "t": 30, "b": 46},
        font={"family": "system-ui, sans-serif", "size": 12, "color": "#334155"},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "xanchor": "left"},
        paper_bgcolor="white", plot_bgcolor="white", hoverlabel={"bgcolor": "white"},
    )  # fmt: skip
    lines = {"gridcolor": GRID_COLOUR, "linecolor": "#cbd5e1", "zeroline": False, "showline": True}
    figure.update_xaxes(title=x_title, **lines)
    figure.update_yaxes({"title": y_title, "rangemode": "tozero"} | lines | (y_axis or {}))
    return figure


def role_colour(role: str) -> str:
    return ROLE_COLOURS.get(role, OTHER_COLOUR)
