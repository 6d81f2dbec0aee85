"""Tables and JSON of a benchmark: rows, and targets from benchmarks/targets.yaml."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from rich.console import Console
from rich.table import Table

TARGETS = Path(__file__).parent / "targets.yaml"
Row = dict[str, object]


@dataclass(frozen=True, slots=True)
class Target:
    """A figure that was promised: at most or at least `bound`."""

    name: str
    value: float
    bound: float
    kind: Literal["most", "least"]

    @property
    def met(self) -> bool:
        return self.value <= self.bound if self.kind == "most" else self.value >= self.bound


def target(benchmark: str, name: str, value: float) -> Target:
    """The target of this name, as benchmarks/targets.yaml has it, with what was measured."""
    promised = yaml.safe_load(TARGETS.read_text())[benchmark][name]
    kind = "least" if "least" in promised else "most"
    return Target(name, value, float(promised[kind]), kind)


def median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("nan")


def spread(values: Sequence[float], unit: str = "", digits: int = 1) -> str:
    """`median [least-most]` for a table cell."""
    low, high = min(values), max(values)
    return f"{median(values):.{digits}f}{unit} [{low:.{digits}f}-{high:.{digits}f}]"


def print_table(title: str, rows: Sequence[Row]) -> None:
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="right" if column != next(iter(rows[0])) else "left")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=160).print(table)


def print_targets(targets: Sequence[Target]) -> None:
    for item in targets:
        print(
            f"{'met ' if item.met else 'MISSED'}  {item.name}: {item.value:.3g} (target: at {item.kind} {item.bound:g})"
        )


def write_json(path: str | None, rows: Sequence[Row], targets: Sequence[Target]) -> None:
    """`{"rows": [...], "targets": [{"name", "value", "target", "kind", "met"}], "machine": ...}`."""
    if path is None:
        return
    listed = [
        {"name": item.name, "value": item.value, "target": item.bound, "kind": item.kind, "met": item.met}
        for item in targets
    ]
    Path(path).write_text(json.dumps({"machine": machine(), "rows": list(rows), "targets": listed}, indent=1) + "\n")


def machine() -> str:
    """Processor and core count, for beside a figure."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(names)} cores"
