"""`steelyard report`: ledgers of a file or of a running gateway, as tables or as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from cluster.ledger_report import PARTS, LedgerReport, report, timelines
from engine.errors import ConfigError, Unavailable

TIMEOUT_S = 10.0
LAST = 1024  # of a gateway's


def run_report(source: str, console: Console, *, as_json: bool) -> None:
    """Raises InvalidRequest, ConfigError or Unavailable."""
    told = report(timelines(_read(source)))
    if as_json:
        console.file.write(json.dumps(asdict(told)) + "\n")
    else:
        _print(told, console)


def _read(source: str) -> str:
    if not source.startswith(("http://", "https://")):
        try:
            return Path(source).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{source}: {error.strerror}", param="source") from None
    try:
        reply = httpx.get(f"{source.rstrip('/')}/debug/requests", params={"last": str(LAST)}, timeout=TIMEOUT_S)
        reply.raise_for_status()
    except httpx.HTTPError as error:
        raise Unavailable(f"{source} did not tell its ledgers: {error}") from None
    return reply.text


def _print(told: LedgerReport, console: Console) -> None:
    words = "; ".join(f"{name}: {' + '.join(stages)}" for name, stages in PARTS.items())
    title = f"{told.num_requests} requests, T = (W_p + S_p) + (W_d + S_d) + rest, in ms"
    times = Table(title=title, title_justify="left", caption=words, caption_justify="left")
    for column in ("", "mean", "P50", "P90", "P99"):
        times.add_column(column, justify="right" if column else "left")
    for one in told.spreads:
        values = (one.mean_s, one.p50_s, one.p90_s, one.p99_s)
        times.add_row(one.name, *(f"{value * 1e3:.1f}" for value in values))
    console.print(times)
    stages = Table(title="Where the time goes, and the gain if a stage took half as long", title_justify="left")
    for column in ("stage", "share", "gain"):
        stages.add_column(column, justify="left" if column == "stage" else "right")
    for stage in told.stages:
        stages.add_row(stage.stage, f"{stage.share:.1%}", f"{stage.gain:.2f}x")
    console.print(stages)
