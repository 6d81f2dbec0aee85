"""Plays that are over, a line of JSON each: a matrix that was ended goes on from where it was.

A line is named by the system, its constants and the cell. Whoever has changed what is played has it played again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import repeat
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, with_config

from benchmarks.ratio_play import Cell, Found, play
from benchmarks.ratio_systems import System

_FOUND = TypeAdapter(with_config(ConfigDict(ser_json_inf_nan="constants"))(Found))


class Plays:
    """Plays side by side in `pool`. `path`: where those that are over are kept; None: nowhere. `again`: systems of
    which nothing is believed."""

    def __init__(self, pool: ProcessPoolExecutor, path: str | None, again: Sequence[str] = ()) -> None:
        self._pool = pool
        self._path = Path(path) if path is not None else None
        self._known: dict[str, Found] = {}
        for line in self._path.read_text().splitlines() if self._path is not None and self._path.exists() else ():
            entry = json.loads(line)
            found = _FOUND.validate_python(entry["found"])
            if found.system not in again:
                self._known[entry["name"]] = found

    def of(self, systems: Sequence[System], cell: Cell) -> list[Found]:
        """What came of each, in their order."""
        fresh = [system for system in systems if name_of(system, cell) not in self._known]
        for system, found in zip(fresh, self._pool.map(play, fresh, repeat(cell)), strict=True):
            self._note(name_of(system, cell), found)
        return [self._known[name_of(system, cell)] for system in systems]

    def _note(self, name: str, found: Found) -> None:
        self._known[name] = found
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps({"name": name, "found": _FOUND.dump_python(found, mode="json")}) + "\n")


def name_of(system: System, cell: Cell) -> str:
    text = repr((system.name, sorted(system.constants.items()), system.num_prefill, sorted(asdict(cell).items())))
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{system.name}-{cell.load}-{digest}".replace(" ", "_")
