"""Reads tables of numpy arrays, in milliseconds:

- Dynamo's mocker: prefill_isl, prefill_ttft_ms, decode_active_kv_tokens, decode_context_length and decode_itl over
  both;
- AIPerf's sweeps, a folder with prefill and decode apart: prefill_isl, prefill_ttft; and, at points of their own,
  x_kv_usage (a part of max_kv_tokens), y_context_length, z_itl. Either of one engine, or with a row for each
  tensor-parallel size in `tp`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from cluster.simulator.service_times.decode_table import DecodeTable, grid
from cluster.simulator.service_times.dynamo import DynamoTimes
from cluster.simulator.service_times.nonnegative import Floats
from cluster.simulator.service_times.phases import PhaseTimes
from cluster.simulator.service_times.prefill_table import PrefillTable
from cluster.simulator.service_times.tables import ONLY, Tables
from engine.errors import ConfigError

SWEEPS = (
    ("prefill.npz", "decode.npz"),
    ("selected_prefill_interpolation/raw_data.npz", "selected_decode_interpolation/raw_data.npz"),
)
MOCKER = ("prefill_isl", "prefill_ttft_ms", "decode_active_kv_tokens", "decode_context_length", "decode_itl")


def read_npz(path: Path) -> Tables:
    """The mocker's table. Raises ConfigError, which names the array."""
    arrays = _arrays(path, MOCKER)
    tokens, prefill_s, active, contexts = (_line(path, name, arrays[name]) for name in MOCKER[:4])
    itl = arrays["decode_itl"]
    _check(path, "prefill_ttft_ms", prefill_s.shape == tokens.shape, "expected a value for each prefill_isl")
    shape = (len(active), len(contexts))
    _check(path, "decode_itl", itl.shape == shape, f"expected the shape {shape} of its axes, got {itl.shape}")
    for name, axis in (("prefill_isl", tokens), (MOCKER[2], active), (MOCKER[3], contexts)):
        _check(path, name, len(axis) > 1 and bool((np.diff(axis) > 0).all()), "expected at least two rising values")
    _check(path, MOCKER[3], bool(contexts[0] > 0), "expected contexts above 0")
    for name in ("prefill_ttft_ms", "decode_itl"):
        _check(path, name, bool((arrays[name] > 0).all()), "expected durations above 0")
    values = (tokens.tolist(), (prefill_s / 1e3).tolist(), active.tolist(), contexts.tolist(), (itl / 1e3).tolist())
    return {"": {ONLY: partial(_phases, *values)}, "dynamo": {ONLY: partial(DynamoTimes, *values)}}


def _phases(
    tokens: list[float], prefill_s: list[float], active: list[float], contexts: list[float], decode_s: list[list[float]]
) -> PhaseTimes:
    by_context = [list(column) for column in zip(*decode_s, strict=True)]
    return PhaseTimes(
        PrefillTable(tokens, prefill_s), DecodeTable(grid(contexts, active, by_context), rows_are_batches=False)
    )


def read_sweep(folder: Path) -> Tables:
    """AIPerf's. Raises ConfigError, which names the array."""
    for names in SWEEPS:
        prefill_path, decode_path = (folder / name for name in names)
        if prefill_path.exists() and decode_path.exists():
            break
    else:
        pairs = " or ".join(" and ".join(names) for names in SWEEPS)
        raise ConfigError(f"{folder}: expected {pairs} in this folder")
    prefill = _arrays(prefill_path, ("prefill_isl", "prefill_ttft"))
    decode = _arrays(decode_path, ("x_kv_usage", "y_context_length", "z_itl", "max_kv_tokens"))
    rows, decode_rows = _rows(prefill_path, prefill), _rows(decode_path, decode)
    _check(decode_path, "tp", sorted(map(str, rows)) == sorted(map(str, decode_rows)), f"expected as in {prefill_path}")
    return {
        "": {
            size: partial(_sweep, (prefill_path, prefill, rows[size]), (decode_path, decode, decode_rows[size]))
            for size in rows
        }
    }


def _rows(path: Path, arrays: Mapping[str, Floats]) -> Mapping[int | None, int]:
    """Of each tensor-parallel size its row; all arrays have as many."""
    if "tp" not in arrays:
        return {ONLY: 0}
    sizes = arrays["tp"].ravel()
    _check(path, "tp", len(np.unique(sizes)) == len(sizes), "expected every size once")
    for name, array in arrays.items():
        _check(path, name, len(array) == len(sizes), f"expected a row for each of {len(sizes)} sizes")
    return {int(size): row for row, size in enumerate(sizes)}


Row = tuple[Path, Mapping[str, Floats], int]


def _sweep(prefill: Row, decode: Row) -> PhaseTimes:
    lengths, ttft = _columns(prefill, "prefill_isl", "prefill_ttft")
    usage, contexts, itl = _columns(decode, "x_kv_usage", "y_context_length", "z_itl")
    (capacity,) = _columns(decode, "max_kv_tokens")
    order = np.argsort(lengths)
    path = prefill[0]
    _check(path, "prefill_isl", len(order) > 1 and len(np.unique(lengths)) == len(order), "expected lengths, each once")
    points = zip(contexts.tolist(), (usage * capacity[0]).tolist(), (itl / 1e3).tolist(), strict=True)
    return PhaseTimes(
        PrefillTable(lengths[order].tolist(), (ttft[order] / 1e3).tolist()),
        DecodeTable(list(points), rows_are_batches=False),
    )


def _columns(row: Row, *names: str) -> list[Floats]:
    """Arrays of one length, all values above 0."""
    path, arrays, index = row
    columns = [np.atleast_2d(arrays[name])[index] for name in names]
    for name, column in zip(names, columns, strict=True):
        _check(path, name, column.shape == columns[0].shape, f"expected as many values as {names[0]}")
        _check(path, name, column.ndim == 1 and len(column) > 0, f"expected a row of values, got {column.shape}")
        _check(path, name, bool((column > 0).all()), "expected values above 0")
    return columns


def _arrays(path: Path, names: tuple[str, ...]) -> Mapping[str, Floats]:
    """The named arrays, and `tp` where there is one."""
    try:
        with path.open("rb") as file:
            stored = np.load(file, allow_pickle=False)
            if not isinstance(stored, np.lib.npyio.NpzFile):
                raise ConfigError(f"{path}: expected several arrays by name (.npz), got one")
            missing = [name for name in names if name not in stored]
            if missing:
                raise ConfigError(f"{path}: has no {missing[0]!r}; it has {', '.join(stored)}")
            loaded = {name: stored[name] for name in (*names, "tp") if name in stored}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    for name, array in loaded.items():
        _check(path, name, array.dtype.kind in "iuf" and array.size > 0, f"expected numbers, got {array.dtype}")
        _check(path, name, bool(np.isfinite(array).all()), "expected finite numbers")
    return {name: array.astype(np.float64) for name, array in loaded.items()}


def _line(path: Path, name: str, array: Floats) -> Floats:
    _check(path, name, array.ndim == 1, f"expected one dimension, got {array.ndim}")
    return array


def _check(path: Path, name: str, is_right: bool, expected: str) -> None:
    if not is_right:
        raise ConfigError(f"{path}: {name}: {expected}")
