"""A fleet: the loads of all workers at one moment, and beside them in arrays what ranks workers.

A decision looks at every worker, and at most of them only to see that it is not the one. One record after the other
that would be the greatest part of a decision in a large cluster; side by side it is a few operations on arrays.
`put` is for who keeps a fleet from one decision to the next (router/kept_loads.py); decisions get a copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

from engine.types import EngineStats, Role
from router.policies.snapshot import Name, WorkerLoad

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Places = npt.NDArray[np.intp]  # in the order of the loads


class Fleet(Sequence[WorkerLoad]):
    """Arrays are of all workers, in the order of the loads."""

    def __init__(self, loads: Iterable[WorkerLoad] = ()) -> None:
        self._loads = list(loads)
        self._stats = [
            load.stats for load in self._loads
        ]  # the newest: a load takes its report in when it is asked for
        size = len(self._loads)
        self.last_due, self.done_at = np.empty(size), np.empty(size)  # of the prompts: the latest due; all computed
        self.first_end, self.tokens, self.tpot_s = np.empty(size), np.empty(size), np.empty(size)  # as in Decodes
        self.num_decodes, self.num_running, self.num_blocks = (np.empty(size, np.int64) for _ in range(3))
        for place, load in enumerate(self._loads):
            self._lay_out(place, load)
        by_id = sorted(range(size), key=lambda place: self._loads[place].member.worker_id)
        self.turn = np.empty(size, np.int64)  # by worker ids
        self.turn[by_id] = np.arange(size)
        self._places: dict[tuple[Role, str | None], Places] = {}
        self._names: dict[tuple[Role, str], list[Name]] = {}
        self._cohorts: dict[Role, tuple[str, ...]] = {}

    @overload
    def __getitem__(self, index: int) -> WorkerLoad: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[WorkerLoad]: ...
    def __getitem__(self, index: int | slice) -> WorkerLoad | Sequence[WorkerLoad]:
        return self._load(index) if isinstance(index, int) else list(self)[index]

    def __len__(self) -> int:
        return len(self._loads)

    def __iter__(self) -> Iterator[WorkerLoad]:
        return map(self._load, range(len(self._loads)))

    # --- pools ------------------------------------------------------------------------------------------------

    def places(self, role: Role, cohort: str | None = None) -> Places:
        """Of those of a role that can be reached; of all cohorts, or of one."""
        places = self._places.get((role, cohort))
        if places is None:
            found = [
                place
                for place, load in enumerate(self._loads)
                if load.connected and load.member.role is role and cohort in (None, load.member.cohort)
            ]
            places = self._places[role, cohort] = np.array(found, np.intp)
        return places

    def cohorts(self, role: Role) -> tuple[str, ...]:
        """Of those of a role that can be reached, as they come."""
        cohorts = self._cohorts.get(role)
        if cohorts is None:
            cohorts = tuple(dict.fromkeys(load.member.cohort for load in self.at(self.places(role))))
            self._cohorts[role] = cohorts
        return cohorts

    def at(self, places: Places) -> list[WorkerLoad]:
        return [self._load(place) for place in places.tolist()]

    def names(self, role: Role, cohort: str) -> list[Name]:
        """Of those of a role and a cohort that can be reached."""
        names = self._names.get((role, cohort))
        if names is None:
            found = self.at(self.places(role, cohort))
            names = self._names[role, cohort] = [load.member.name for load in found]
        return names

    def is_connected(self, place: int) -> bool:
        return self._loads[place].connected

    # --- from one moment to the next --------------------------------------------------------------------------

    def put(self, place: int, load: WorkerLoad) -> None:
        """Another load of the same worker."""
        if load.connected is not self._loads[place].connected:
            self._places, self._names, self._cohorts = {}, {}, {}
        self._loads[place], self._stats[place] = load, load.stats
        self._lay_out(place, load)

    def report(self, place: int, stats: EngineStats) -> None:
        """Another report of the same worker."""
        before, self._stats[place] = self._stats[place], stats
        if (stats.num_running, stats.num_blocks) != (before.num_running, before.num_blocks):
            self.num_running[place], self.num_blocks[place] = stats.num_running, stats.num_blocks

    def copy(self) -> Fleet:
        """That stays as it is. What does not change with loads is shared."""
        other = Fleet.__new__(Fleet)
        other._loads, other._stats = self._loads.copy(), self._stats.copy()
        other.last_due, other.done_at = self.last_due.copy(), self.done_at.copy()
        other.first_end, other.tokens, other.tpot_s = self.first_end.copy(), self.tokens.copy(), self.tpot_s.copy()
        other.num_decodes, other.num_running = self.num_decodes.copy(), self.num_running.copy()
        other.num_blocks, other.turn = self.num_blocks.copy(), self.turn
        other._places, other._names, other._cohorts = self._places, self._names, self._cohorts
        return other

    def _load(self, place: int) -> WorkerLoad:
        load, stats = self._loads[place], self._stats[place]
        if load.stats is not stats:
            load = self._loads[place] = WorkerLoad(
                load.member, load.connected, load.num_sequences, load.num_prompt_tokens, stats, load.prompts,
                load.decodes,
            )  # fmt: skip
        return load

    def _lay_out(self, place: int, load: WorkerLoad) -> None:
        prompts, decodes, stats = load.prompts, load.decodes, load.stats
        self.last_due[place] = prompts.dues[-1] if prompts.dues else -math.inf
        self.done_at[place] = prompts.done_at[-1]
        self.first_end[place] = decodes.ends[0] if decodes.ends else math.inf
        self.num_decodes[place], self.tokens[place], self.tpot_s[place] = (
            len(decodes.ends), decodes.tokens[0], decodes.tpots_s[0],
        )  # fmt: skip
        self.num_running[place], self.num_blocks[place] = stats.num_running, stats.num_blocks


def fleet_of(loads: Sequence[WorkerLoad]) -> Fleet:
    return loads if isinstance(loads, Fleet) else Fleet(loads)
