"""Loading: what a user calls a workload (a trace, a YAML file, or a short text) becomes one.

- a trace: a path; its format is told from its content;
- a YAML file: `parts`, by name, each with a `kind` and that kind's keys (workloads/parts.py); they are mixed;
- a short text: a kind and its keys, as in poisson:rate=4,prompt=1024,output=128,seconds=300
"""

from __future__ import annotations

import math
from pathlib import Path

from pydantic import Field

from cluster.config import read_yaml, validated
from cluster.simulator.chance import Chance
from cluster.simulator.workloads.parts import KINDS, Part, TracePart
from cluster.simulator.workloads.shape import cut, mix, speed_up
from cluster.simulator.workloads.synthesis import synthesise
from cluster.simulator.workloads.workload import Workload
from engine.config import StrictModel
from engine.errors import ConfigError


class _Description(StrictModel):
    """A YAML file."""

    name: str | None = Field(default=None, min_length=1, description="the file's, when null")
    parts: dict[str, dict[str, object]] = Field(min_length=1)


def load_workload(
    source: str, seed: int, *, speedup: float = 1.0, max_requests: int | None = None, max_s: float | None = None
) -> Workload:
    """It is sped up first, then cut. Raises ConfigError that names the source, and the line or key."""
    if not (math.isfinite(speedup) and speedup > 0):
        raise ConfigError(f"speedup: must be more than 0, got {speedup:g}")
    workload = cut(speed_up(_load(source, Chance(seed, "workload")), speedup), max_s, max_requests)
    if not workload.arrivals:
        raise ConfigError(f"{source}: has no requests")
    return workload


def _load(source: str, chance: Chance) -> Workload:
    kind, _, keys = source.partition(":")
    if kind in KINDS:
        return synthesise(_from_text(source, kind, keys), source, Path(), chance.fork(kind))
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        return _from_yaml(path, chance)
    return synthesise(TracePart(path=source), path.name, Path(), chance.fork("trace"))


def _from_text(source: str, kind: str, keys: str) -> Part:
    values: dict[str, object] = {}
    for pair in filter(None, keys.split(",")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"{source}: expected key=value, got {pair!r}")
        if key in values:
            raise ConfigError(f"{source}: {key}: is given twice")
        values[key] = value
    return validated(KINDS[kind], values, f"{source}: ", strict=False)


def _from_yaml(path: Path, chance: Chance) -> Workload:
    described = validated(_Description, read_yaml(path), f"{path}: ")
    workloads = [
        synthesise(_part(path, name, values), f"{path}: parts.{name}", path.parent, chance.fork(name))
        for name, values in described.parts.items()
    ]
    return mix(described.name or path.stem, workloads)


def _part(path: Path, name: str, values: dict[str, object]) -> Part:
    where = f"{path}: parts.{name}."
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"{where}kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    return validated(KINDS[kind], {key: value for key, value in values.items() if key != "kind"}, where)
