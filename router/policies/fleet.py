"""A fleet: the loads of all workers at one moment, and beside them, column by column, what ranks workers.

A decision looks at every worker, and at most of them only to see that it is not the one. Record after record that would
be the greatest part of a decision in a large cluster; columns of plain numbers are gone through in a few microseconds.
`put` and `report` are for who keeps a fleet from one decision to the next (router/kept_loads.py): decisions get a copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

from engine.types import EngineStats, Role
from router.policies.snapshot import Name, WorkerLoad


class Fleet(Sequence[WorkerLoad]):
    """Columns are in the order of the loads; what says places counts in that order, too."""

    def __init__(self, loads: Iterable[WorkerLoad] = ()) -> None:
        self._loads = list(loads)
        self._stats = [load.stats for load in self._loads]  # the newest: loads take them in when they are asked for
        size = len(self._loads)
        self.last_due, self.done_at = [0.0] * size, [0.0] * size  # of the prompts: the latest due; when all are done
        self.first_end, self.tokens, self.tpot_s = [0.0] * size, [0.0] * size, [0.0] * size  # of Decodes
        self.num_decodes, self.num_running, self.num_blocks = [0] * size, [0] * size, [0] * size
        for place, load in enumerate(self._loads):
            self._lay_out(place, load)
        self._places: dict[tuple[Role, str | None], list[int]] = {}
        self._names: dict[tuple[Role, str], list[Name]] = {}
        self._cohorts: dict[Role, list[str]] = {}

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

    def at(self, places: list[int]) -> list[WorkerLoad]:
        return [self._load(place) for place in places]

    # --- pools ------------------------------------------------------------------------------------------------

    def places(self, role: Role, cohort: str | None = None) -> list[int]:
        """Of those of a role that can be reached; of all cohorts, or of one."""
        places = self._places.get((role, cohort))
        if places is None:
            places = self._places[role, cohort] = [
                place
                for place, load in enumerate(self._loads)
                if load.connected and load.member.role is role and cohort in (None, load.member.cohort)
            ]
        return places

    def names(self, role: Role, cohort: str) -> list[Name]:
        """Of those of a role and a cohort that can be reached."""
        names = self._names.get((role, cohort))
        if names is None:
            names = [self._loads[place].member.name for place in self.places(role, cohort)]
            self._names[role, cohort] = names
        return names

    def cohorts(self, role: Role) -> list[str]:
        """Of those of a role that can be reached, as they come."""
        cohorts = self._cohorts.get(role)
        if cohorts is None:
            found = dict.fromkeys(self._loads[place].member.cohort for place in self.places(role))
            cohorts = self._cohorts[role] = list(found)
        return cohorts

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
        self._stats[place] = stats
        self.num_running[place], self.num_blocks[place] = stats.num_running, stats.num_blocks

    def copy(self) -> Fleet:
        """That stays as it is. What does not change with loads is shared."""
        other = Fleet.__new__(Fleet)
        other._loads, other._stats = self._loads.copy(), self._stats.copy()
        other.last_due, other.done_at = self.last_due.copy(), self.done_at.copy()
        other.first_end, other.tokens, other.tpot_s = self.first_end.copy(), self.tokens.copy(), self.tpot_s.copy()
        other.num_decodes, other.num_running = self.num_decodes.copy(), self.num_running.copy()
        other.num_blocks = self.num_blocks.copy()
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
        self.tokens[place], self.tpot_s[place] = decodes.tokens[0], decodes.tpots_s[0]
        self.num_decodes[place] = len(decodes.ends)
        self.num_running[place], self.num_blocks[place] = stats.num_running, stats.num_blocks


def fleet_of(loads: Sequence[WorkerLoad]) -> Fleet:
    return loads if isinstance(loads, Fleet) else Fleet(loads)
