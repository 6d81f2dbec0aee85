"""A plan as a page: what each phase does per GPU, and what each cluster that was tried did at which rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import plotly.graph_objects as go
from plotly.io import to_html

from cluster.simulator.planning.placements import PhaseGoodput
from cluster.simulator.planning.search import Plan, Tried
from cluster.simulator.planning.targets import Target

PREFILL_COLOUR, DECODE_COLOUR, LIMIT_COLOUR = "#3b6fb6", "#c8793a", "#888888"


def page(title: str, facts: Mapping[str, str], plan: Plan, targets: Sequence[Target]) -> str:
    """One HTML file that needs nothing from elsewhere."""
    rows = "\n".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items())
    figures = [_phases(plan.prefill, plan.decode), *(_target(plan.tried, index, t) for index, t in enumerate(targets))]
    plots = "\n".join(
        to_html(figure, full_html=False, include_plotlyjs=not index, div_id=f"plot-{index}")
        for index, figure in enumerate(figures)
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }}
th {{ text-align: left; padding-right: 1.5rem; font-weight: 600; vertical-align: top; white-space: nowrap; }}
</style></head><body><h1>{escape(title)}</h1><table>
{rows}
</table>
{plots}
</body></html>
"""


def _phases(prefill: Sequence[PhaseGoodput], decode: Sequence[PhaseGoodput]) -> go.Figure:
    figure = go.Figure()
    for name, found, colour in (("prefill", prefill, PREFILL_COLOUR), ("decode", decode, DECODE_COLOUR)):
        sizes = [f"TP{one.tensor_parallel}" for one in found]
        figure.add_bar(name=name, x=sizes, y=[one.per_gpu for one in found], marker_color=colour)
    figure.update_layout(
        title="Each phase alone", yaxis_title="goodput, requests/s per GPU", xaxis_title="tensor-parallel size",
        template="plotly_white",
    )  # fmt: skip
    return figure


def _target(tried: Sequence[Tried], index: int, target: Target) -> go.Figure:
    """One target's quantile over the rate, a line per split; what failed is left out."""
    by_split: dict[str, list[Tried]] = {}
    for one in tried:
        if math.isfinite(one.verdict.values_s[index]):
            by_split.setdefault(f"{one.split.num_gpus} GPUs: {one.split}", []).append(one)
    figure = go.Figure()
    for name, runs in by_split.items():
        runs.sort(key=lambda one: one.rate)
        values = [one.verdict.values_s[index] * 1e3 for one in runs]
        figure.add_scatter(name=name, x=[one.rate for one in runs], y=values, mode="lines+markers")
    figure.add_hline(y=target.limit_s * 1e3, line_dash="dash", line_color=LIMIT_COLOUR)
    figure.update_layout(
        title=str(target), xaxis_title="requests/s", yaxis_title="ms", yaxis_type="log", template="plotly_white"
    )
    return figure
