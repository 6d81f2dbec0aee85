"""Plays that are over, a file each: a matrix that was ended goes on from where it was.

A file is named by the system, its constants and the cell. Whoever changes what is played takes another folder.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from functools import partial
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, with_config

from benchmarks.ratio_play import Cell, Found, play
from benchmarks.ratio_systems import System

_FOUND = TypeAdapter(with_config(ConfigDict(ser_json_inf_nan="constants"))(Found))


def stored(folder: str | None) -> partial[Found]:
    """`play`, that looks there first; None: nowhere. It can be sent to another process."""
    return partial(play_once, folder)


def play_once(folder: str | None, system: System, cell: Cell) -> Found:
    if folder is None:
        return play(system, cell)
    path = Path(folder) / f"{_name(system, cell)}.json"
    if path.exists():
        return _FOUND.validate_json(path.read_bytes())
    found = play(system, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".part")
    fresh.write_bytes(_FOUND.dump_json(found))
    fresh.replace(path)
    return found


def _name(system: System, cell: Cell) -> str:
    text = repr((system.name, sorted(system.constants.items()), system.num_prefill, sorted(asdict(cell).items())))
    return f"{system.name}-{cell.load}-{hashlib.sha256(text.encode()).hexdigest()[:16]}".replace(" ", "_")
