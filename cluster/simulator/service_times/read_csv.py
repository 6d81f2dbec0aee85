"""Reads measurements by model, device and tensor-parallel size from CSV files, in milliseconds, of two kinds:

- model, system, tp, phase, batch_size, isl_or_context, latency_ms: a step of one phase per line;
- Splitwise's (Patel et al., ISCA 2024): model, hardware, tensor_parallel, prompt_size, batch_size, token_size,
  prompt_time, token_time: a run per line. Its decode steps have half of its tokens behind them on average.

Prefill is taken from the lines of one prompt at a time. Tables are named model@device.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cluster.simulator.service_times.build import PREFILL, Measurement, times_of
from cluster.simulator.service_times.tables import Tables
from engine.errors import ConfigError

Line = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Kind:
    """`columns` that a file of this kind has; `measurements` of one of its lines."""

    columns: tuple[str, ...]
    device: str
    size: str
    measurements: Callable[[Line], Iterator[Measurement]]


def read_csv(path: Path) -> Tables:
    """Raises ConfigError, which names the line."""
    found: dict[str, dict[int | None, list[Measurement]]] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = csv.DictReader(file)
            kind = _kind_of(path, lines.fieldnames or ())
            for line in lines:
                try:
                    table = found.setdefault(f"{line['model']}@{line[kind.device]}", {})
                    table.setdefault(int(line[kind.size]), []).extend(kind.measurements(line))
                except (TypeError, ValueError) as error:
                    raise ConfigError(f"{path}: line {lines.line_num}: {error}") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    return {
        name: {size: partial(times_of, f"{path}: {name}", measured) for size, measured in sizes.items()}
        for name, sizes in found.items()
    }


def _kind_of(path: Path, columns: object) -> _Kind:
    for kind in KINDS:
        if set(kind.columns) <= set(columns if isinstance(columns, (list, tuple)) else ()):
            return kind
    known = " or ".join(", ".join(kind.columns) for kind in KINDS)
    raise ConfigError(f"{path}: line 1: expected the columns {known}")


def _of_phase(line: Line) -> Iterator[Measurement]:
    phase, batch, tokens = line["phase"], int(line["batch_size"]), int(line["isl_or_context"])
    if phase not in ("prefill", "decode"):
        raise ValueError(f"phase: expected prefill or decode, got {phase!r}")
    yield Measurement(phase, batch, tokens, _seconds(line, "latency_ms"))


def _of_run(line: Line) -> Iterator[Measurement]:
    batch, prompt = int(line["batch_size"]), int(line["prompt_size"])
    yield Measurement(PREFILL, batch, prompt, _seconds(line, "prompt_time"))
    yield Measurement("decode", batch, prompt + int(line["token_size"]) / 2, _seconds(line, "token_time"))


def _seconds(line: Line, column: str) -> float:
    value = float(line[column])
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{column}: expected milliseconds above 0, got {line[column]!r}")
    return value / 1e3


KINDS = (
    _Kind(("model", "system", "tp", "phase", "batch_size", "isl_or_context", "latency_ms"), "system", "tp", _of_phase),
    _Kind(
        tuple("model hardware tensor_parallel prompt_size batch_size token_size prompt_time token_time".split()),
        "hardware", "tensor_parallel", _of_run,
    ),
)  # fmt: skip
