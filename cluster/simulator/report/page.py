"""The page of a report: one HTML file that needs nothing else, equal for equal results.

All that comes from a user (names, paths, the command, the configuration) is escaped here; what stands in plots is
escaped by plotly, as JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import plotly.io
from plotly.offline import get_plotlyjs

from cluster.simulator.report.figures import Plot, plots
from cluster.simulator.report.summary import Latency, Summary, Targets
from cluster.simulator.results import Happening, SimulationResult

MAX_HAPPENINGS = 200  # listed
PLOT_OPTIONS = {"displayModeBar": False, "responsive": True}  # a drag zooms, a double click resets


@dataclass(frozen=True, slots=True)
class About:
    """What was simulated, in words. `facts` are names with values; `config` is YAML."""

    title: str
    command: str
    facts: tuple[tuple[str, str], ...]
    config: str


def page(about: About, result: SimulationResult, summary: Summary, targets: Targets) -> str:
    body = "\n".join((
        f"<h1>{escape(about.title)}</h1>",
        f"<p class='command'><code>{escape(about.command)}</code></p>",
        _warnings(summary),
        _tiles(summary),
        _latencies(summary.latencies),
        "<div class='plots'>", *map(_plot, plots(result, summary, targets)), "</div>",
        _happenings(result.happenings),
        _about(about, result),
    ))  # fmt: skip
    head = f"<meta charset='utf-8'><title>{escape(about.title)}</title><style>{_STYLE}</style>"
    script = f"<script>{get_plotlyjs()}</script>"
    return (
        f"<!doctype html>\n<html lang='en'><head>{head}{script}</head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def in_ms(value_s: float | None) -> str:
    """Milliseconds; a dash of nothing."""
    return "–" if value_s is None else f"{value_s * 1e3:,.1f}"


def in_percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _warnings(summary: Summary) -> str:
    said: list[str] = []
    if summary.extrapolated_share:
        said.append(
            f"{in_percent(summary.extrapolated_share)} of all steps lie beyond what the service times were measured "
            "for: their durations are extrapolated."
        )
    if summary.errors:
        counts = ", ".join(f"{error.count:,} {error.code}" for error in summary.errors)
        said.append(f"Requests that ended with an error: {counts}.")
    return "".join(f"<p class='warning'>{escape(words)}</p>" for words in said)


def _tiles(summary: Summary) -> str:
    tiles = [
        ("requests", f"{summary.num_requests:,}"),
        ("answered whole", f"{summary.num_finished:,}"),
        ("requests/s", f"{summary.requests_per_s:.3g}"),
        ("output tokens/s", f"{summary.output_tokens_per_s:,.0f}"),
        ("prompt tokens/s", f"{summary.prompt_tokens_per_s:,.0f}"),
        ("of them cached", in_percent(summary.cached_share)),
        ("virtual time", f"{summary.span_s:,.1f} s"),
    ]
    if summary.attained is not None:
        tiles.insert(0, ("kept all targets", in_percent(summary.attained)))
    shown = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in tiles)
    return f"<div class='tiles'>{shown}</div>"


def _latencies(latencies: Iterable[Latency]) -> str:
    rows = (
        (
            f"{one.name} (ms)",
            in_ms(one.p50_s),
            in_ms(one.p90_s),
            in_ms(one.p99_s),
            in_ms(one.target_s),
            in_percent(one.attained),
        )
        for one in latencies
    )
    return _table(("", "P50", "P90", "P99", "target", "kept"), rows, "numbers")


def _plot(plot: Plot) -> str:
    drawn = plotly.io.to_html(
        plot.figure, full_html=False, include_plotlyjs=False, div_id=plot.name, config=PLOT_OPTIONS
    )
    return f"<section><h2>{escape(plot.title)}</h2><p>{escape(plot.words)}</p>{drawn}</section>"


def _happenings(happenings: Sequence[Happening]) -> str:
    later = [happening for happening in happenings if happening.at_s > 0]
    if not later:
        return ""
    rows = ((f"{one.at_s:,.3f}", one.worker_id, one.what) for one in later[:MAX_HAPPENINGS])
    left = f"<p>and {len(later) - MAX_HAPPENINGS:,} more</p>" if len(later) > MAX_HAPPENINGS else ""
    return f"<h2>What changed under way</h2>{_table(('virtual time (s)', 'worker', 'what'), rows)}{left}"


def _about(about: About, result: SimulationResult) -> str:
    facts = (
        *about.facts,
        ("engine steps", f"{result.num_steps:,}, of which {result.num_extrapolated:,} extrapolated"),
        ("digest of the event log", result.digest),
    )
    config = f"<details><summary>Configuration</summary><pre>{escape(about.config)}</pre></details>"
    return f"<h2>What was simulated</h2>{_table((), facts)}{config}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table class='{kind}'><tr>{cells}</tr>{body}</table>"


_STYLE = """
body { margin: 0; background: #f6f8fb; color: #1e293b; font: 15px/1.45 system-ui, sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 24px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 16px; margin: 24px 0 6px; }
.command { margin: 0 0 16px; color: #475569; overflow-wrap: anywhere; }
.warning { background: #fef3c7; border-left: 4px solid #d97706; padding: 8px 12px; margin: 8px 0; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 16px 0; }
.tiles div { background: white; border: 1px solid #e2e8f0; border-radius: 8px; padding: 10px 16px; }
.tiles b { display: block; font-size: 20px; } .tiles span { color: #64748b; font-size: 13px; }
table { border-collapse: collapse; background: white; border: 1px solid #e2e8f0; }
th, td { text-align: left; padding: 5px 14px; border-bottom: 1px solid #eef2f7; overflow-wrap: anywhere; }
th { color: #64748b; font-weight: 600; } .numbers td + td, .numbers th + th { text-align: right; }
.plots { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; margin-top: 20px; }
section { background: white; border: 1px solid #e2e8f0; border-radius: 8px; padding: 12px 14px 4px; min-width: 0; }
section h2 { margin: 0; } section p { margin: 0; color: #64748b; font-size: 13px; }
@media (max-width: 900px) { .plots { grid-template-columns: minmax(0, 1fr); } }
pre { background: white; border: 1px solid #e2e8f0; padding: 12px; overflow: auto; }
summary { cursor: pointer; margin: 12px 0; }
"""
