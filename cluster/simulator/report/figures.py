"""The plots of a report, each a plotly figure with the words that go above it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import plotly.graph_objects as go

from cluster.simulator.report.axes import (
    MARK_COLOUR,
    OTHER_COLOUR,
    QUANTILE_COLOURS,
    SHARES,
    TARGET_COLOUR,
    AxisOptions,
    TimeAxis,
    latency_unit,
    plain_figure,
    role_colour,
    time_axis,
)
from cluster.simulator.report.series import Bin, PoolLook, bins, pool_looks, thinned
from cluster.simulator.report.summary import QUANTILES, Latency, Summary, Targets, known, quantile
from cluster.simulator.results import RequestResult, SimulationResult

MAX_POINTS = 2000  # requests shown one by one
LONG_TAIL = 8  # times the median: a P99 beyond needs a logarithmic axis

Time = Callable[[RequestResult], float | None]


@dataclass(frozen=True, slots=True)
class Plot:
    """`name` is the page's own id for it."""

    name: str
    title: str
    words: str
    figure: go.Figure


def plots(result: SimulationResult, summary: Summary, targets: Targets) -> Iterator[Plot]:
    axis = time_axis(result.span_s, result.happenings)
    by_time, looks = bins(result.requests), pool_looks(result.samples)
    width = f"in bins of {by_time[0].width_s:g} s" if by_time else ""
    yield Plot("arrivals", "Arrivals", f"Requests per second, {width}.", _arrivals(axis, by_time))
    changes = "; triangles: what changed under way" if axis.marks else ""
    yield Plot("pools", "Pools", f"Workers by role, stacked{changes}.", _workers(axis, looks))
    running = _by_role(axis, looks, "sequences", lambda look: look.num_running)
    yield Plot("running", "Running", "Sequences in the engines of a pool, on average.", running)
    queues = _by_role(axis, looks, "requests", lambda look: look.num_queued)
    yield Plot("queues", "Queues", "Requests of a pool that wait to be computed, on average.", queues)
    yield Plot(
        "blocks",
        "KV blocks in use",
        "Of all blocks of a pool; dotted: held for hand-offs and reservations.",
        _blocks(axis, looks),
    )
    if summary.attained is not None:
        words = f"Share of requests that kept the targets, by arrival, {width}."
        yield Plot("attainment", "Attainment", words, _attainment(axis, by_time, targets))
    for latency, words, time in (
        (summary.ttft, "Arrival to first token", lambda request: request.ttft_s),
        (summary.gap, "First token to second", lambda request: request.gap_s),
        (summary.tpot, "Mean time per token after the first", lambda request: request.tpot_s),
    ):
        name, title = latency.name.split()[-1].lower(), latency.name[0].upper() + latency.name[1:]
        yield Plot(name, title, f"{words}, by arrival; quantiles {width}.", _over_time(axis, by_time, latency, time))
        yield Plot(
            f"{name}-spread",
            f"{title}, distribution",
            "Share of requests at or below.",
            _spread(by_time, latency, time),
        )


def _arrivals(axis: TimeAxis, by_time: list[Bin]) -> go.Figure:
    figure = axis.plot("requests/s")
    x, width = axis.unit.of(one.middle_s for one in by_time), [one.width_s / axis.unit.per for one in by_time]
    bars = go.Bar(x=x, y=[one.per_s for one in by_time], width=width, marker={"color": OTHER_COLOUR}, name="arrivals")
    return figure.add_trace(bars)


def _workers(axis: TimeAxis, looks: dict[str, list[PoolLook]]) -> go.Figure:
    """Stacked, so that a change of role moves the border between two pools."""
    sizes = [sum(look.num_workers for look in at_once) for at_once in zip(*looks.values(), strict=True)]
    top = max(sizes, default=1)
    figure = axis.plot("workers", {"dtick": math.ceil(top / 8), "range": [0, 1.15 * top]})
    for role, pool in looks.items():
        figure.add_trace(_line(axis, role, pool, lambda look: look.num_workers).update(stackgroup="workers"))
    if axis.marks:
        texts = [f"{mark.worker_id} {mark.what}" for mark in axis.marks]
        x, y = axis.unit.of(mark.at_s for mark in axis.marks), [1.07 * top] * len(axis.marks)
        marker = {"symbol": "triangle-down", "size": 9, "color": MARK_COLOUR}
        changes = go.Scatter(
            x=x, y=y, mode="markers", marker=marker, text=texts, hovertemplate="%{text}", name="changes"
        )
        figure.add_trace(changes)
    return figure


def _by_role(
    axis: TimeAxis,
    looks: dict[str, list[PoolLook]],
    unit: str,
    value: Callable[[PoolLook], float],
    y_axis: AxisOptions | None = None,
) -> go.Figure:
    figure = axis.plot(unit, y_axis)
    for role, pool in looks.items():
        figure.add_trace(_line(axis, role, pool, value))
    return figure


def _blocks(axis: TimeAxis, looks: dict[str, list[PoolLook]]) -> go.Figure:
    figure = _by_role(axis, looks, "share of blocks", lambda look: look.used_share, {"tickformat": ".0%"})
    for role, pool in looks.items():
        figure.add_trace(_line(axis, role, pool, lambda look: look.held_share, name=f"{role}, held", dash="dot"))
    return figure


def _line(
    axis: TimeAxis,
    role: str,
    pool: list[PoolLook],
    value: Callable[[PoolLook], float],
    name: str = "",
    dash: str = "solid",
) -> go.Scatter:
    x, y = axis.unit.of(look.at_s for look in pool), [value(look) for look in pool]
    line = {"color": role_colour(role), "width": 1.6, "shape": "hv", "dash": dash}
    return go.Scatter(x=x, y=y, mode="lines", line=line, name=name or role)


def _attainment(axis: TimeAxis, by_time: list[Bin], targets: Targets) -> go.Figure:
    figure = axis.plot("share of requests", SHARES)
    ttft, tpot = Targets(ttft_s=targets.ttft_s), Targets(tpot_s=targets.tpot_s)
    for name, kept, colour, width in (
        ("both", targets, "#111827", 3.0), ("TTFT", ttft, "#7c3aed", 1.4), ("TPOT", tpot, "#0891b2", 1.4),
    ):  # fmt: skip
        if kept == Targets() or (name == "both" and kept in (ttft, tpot)):
            continue
        x, y = axis.unit.of(one.middle_s for one in by_time), [one.attained(kept) for one in by_time]
        line = {"color": colour, "width": width}
        figure.add_trace(go.Scatter(x=x, y=y, mode="lines+markers", line=line, marker={"size": 4}, name=name))
    return figure


def _over_time(axis: TimeAxis, by_time: list[Bin], latency: Latency, time: Time) -> go.Figure:
    requests = [request for one in by_time for request in one.requests if time(request) is not None]
    unit = latency_unit(latency.p99_s or 0.0)
    figure = axis.plot(f"{latency.name} ({unit.name})")
    shown = thinned(requests, MAX_POINTS)
    name = "a request" if len(shown) == len(requests) else f"a request (one in {len(requests) // len(shown)} shown)"
    figure.add_trace(
        go.Scatter(
            x=axis.unit.of(request.arrived_s for request in shown), y=unit.of(map(time, shown)), mode="markers",
            marker={"size": 4, "color": "#94a3b8", "opacity": 0.7}, name=name, hoverinfo="skip",
        )
    )  # fmt: skip
    for part, share in QUANTILES.items():
        y = [quantile(known(map(time, one.requests)), share) for one in by_time]
        line = {"color": QUANTILE_COLOURS[part], "width": 1.8}
        x = axis.unit.of(one.middle_s for one in by_time)
        figure.add_trace(go.Scatter(x=x, y=unit.of(y), mode="lines", line=line, name=part))
    if latency.target_s is not None:
        ends = [0.0, axis.span_s / axis.unit.per]
        figure.add_trace(_straight(ends, [latency.target_s / unit.per] * 2, "target", TARGET_COLOUR))
    return figure


def _spread(by_time: list[Bin], latency: Latency, time: Time) -> go.Figure:
    times = sorted(known(time(request) for one in by_time for request in one.requests))
    unit = latency_unit(latency.p99_s or 0.0)
    figure = plain_figure(f"{latency.name} ({unit.name})", "share of requests", SHARES)
    shares = [(index + 1) / len(times) for index in range(len(times))]
    x, y = unit.of(thinned(times, MAX_POINTS)), thinned(shares, MAX_POINTS)
    figure.add_trace(
        go.Scatter(x=x, y=y, mode="lines", line={"color": OTHER_COLOUR, "width": 2, "shape": "hv"}, name=latency.name)
    )
    lines = [(part, value, QUANTILE_COLOURS[part]) for part, value in latency.quantiles]
    for name, value, colour in (*lines, ("target", latency.target_s, TARGET_COLOUR)):
        if value is not None:
            figure.add_trace(_straight([value / unit.per] * 2, [0.0, 1.0], name, colour))
    if latency.p50_s and (latency.p99_s or 0.0) > LONG_TAIL * latency.p50_s:
        figure.update_xaxes(type="log", dtick="D2")
    return figure


def _straight(x: list[float], y: list[float], name: str, colour: str) -> go.Scatter:
    return go.Scatter(x=x, y=y, mode="lines", line={"color": colour, "width": 1.2, "dash": "dash"}, name=name)
