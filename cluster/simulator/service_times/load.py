"""Loads service times from FILE or FILE:SELECTOR. By what the source is:

1. `default`: the roofline's round numbers;
2. *.yaml: the profile of a live worker (`profile.py`);
3. *.npz: the table of Dynamo's mocker; with the selector `dynamo`, read by the mocker's own rules (`dynamo.py`);
4. a folder: AIPerf's sweep of one engine, prefill and decode in a file each;
5. *.csv: measurements by model, device and tensor-parallel size, as published with Splitwise or of vLLM's kernels;
6. *.json: DistServe's coefficients by model and tensor-parallel size.

A source may hold several tables; selector and tensor-parallel size choose one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from cluster.simulator.service_times.measured import MeasuredTimes
from cluster.simulator.service_times.model import ServiceTimes
from cluster.simulator.service_times.profile import read_profile
from cluster.simulator.service_times.read_csv import read_csv
from cluster.simulator.service_times.read_json import read_json
from cluster.simulator.service_times.read_npz import read_npz, read_sweep
from cluster.simulator.service_times.roofline import Roofline
from cluster.simulator.service_times.tables import ONLY, Tables
from engine.errors import ConfigError

DEFAULT = "default"

READERS: Mapping[str, Callable[[Path], Tables]] = {".npz": read_npz, ".csv": read_csv, ".json": read_json}


def load_service_times(source: str, tensor_parallel: int | None = None) -> ServiceTimes:
    """`tensor_parallel` may be left out where the source has one size only, or knows nothing of sizes.

    Raises ConfigError, which names the file and what could be chosen."""
    if source == DEFAULT:
        return Roofline()
    path, selector = _parts(source)
    if path.suffix in (".yaml", ".yml"):
        if selector:
            raise ConfigError(f"{path}: a profile has no selector, got {selector!r}")
        return MeasuredTimes([step.record for step in read_profile(path).steps])
    tables = _read(path)
    name = _chosen_name(path, tables, selector)
    return tables[name][_chosen_size(path, name, tuple(tables[name]), tensor_parallel)]()


def tensor_parallel_sizes(source: str) -> tuple[int, ...]:
    """The sizes that a source has figures of, rising; empty where it knows nothing of sizes. Raises ConfigError."""
    if source == DEFAULT:
        return ()
    path, selector = _parts(source)
    if path.suffix in (".yaml", ".yml"):
        return ()
    tables = _read(path)
    return tuple(sorted(filter(None, tables[_chosen_name(path, tables, selector)])))


def _parts(source: str) -> tuple[Path, str]:
    """The file, which must exist, and the selector after it."""
    colons = [index for index, letter in enumerate(source) if letter == ":"]
    for end in (len(source), *reversed(colons)):
        if end and (path := Path(source[:end])).exists():
            return path, source[end + 1 :]
    raise ConfigError(f"{source}: there is no such file; service times are FILE, FILE:SELECTOR or {DEFAULT!r}")


def _read(path: Path) -> Tables:
    if path.is_dir():
        return read_sweep(path)
    if path.suffix not in READERS:
        raise ConfigError(f"{path}: service times are read from .npz, .csv, .json, .yaml or a folder")
    return READERS[path.suffix](path)


def _chosen_name(path: Path, tables: Tables, selector: str) -> str:
    if selector in tables:
        return selector
    if not selector and len(tables) == 1:
        return next(iter(tables))
    asked = f"has no {selector!r}" if selector else "has several tables"
    raise ConfigError(f"{path}: {asked}; choose one as {path}:SELECTOR: {', '.join(filter(None, tables))}")


def _chosen_size(path: Path, name: str, sizes: tuple[int | None, ...], asked: int | None) -> int | None:
    if asked in sizes:
        return asked
    if len(sizes) == 1 and asked in (None, 1 if sizes[0] is ONLY else None):
        return sizes[0]
    there = ", ".join(str(size) for size in sizes if size is not ONLY)
    has = f"tensor-parallel sizes {there}" if there else "one worker as it was measured, of no other size"
    raise ConfigError(f"{path}: {name + ' ' if name else ''}has {has}; got {asked if asked else 'no size'}")
