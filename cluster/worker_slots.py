"""The slots of all workers: those that the pools begin with, those that were added, without those that have left."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from cluster.config import PoolConfig, PoolsSection
from cluster.slot import Slot
from engine.types import Role

_NAME = re.compile(r"(prefill|decode)-(\d+)")


@dataclass(slots=True)
class WorkerSlot(Slot):
    """`role`: the pool in which each life of it begins."""

    role: Role = Role.PREFILL
    pool: PoolConfig = field(default_factory=PoolConfig)
    keeper: asyncio.Task[None] | None = None


class WorkerSlots:
    """In the order in which they came, prefill first at the beginning."""

    def __init__(self, pools: PoolsSection) -> None:
        self._pools = {Role.PREFILL: pools.prefill, Role.DECODE: pools.decode}
        self._slots = [
            WorkerSlot(f"{role}-{index}", role=role, pool=pool)
            for role, pool in self._pools.items()
            for index in range(pool.workers)
        ]

    def __iter__(self) -> Iterator[WorkerSlot]:
        return iter(tuple(self._slots))

    def add(self, role: Role) -> WorkerSlot:
        """A new one, of the first name of this pool that is free."""
        taken = {slot.name for slot in self._slots}
        index = next(number for number in range(len(taken) + 1) if f"{role}-{number}" not in taken)
        return self._append(f"{role}-{index}", role, is_new=True)

    def find(self, living: Sequence[str], most: int | None) -> None:
        """Slots for all workers that live, whoever had them come; of those that do not, no more than make `most`."""
        for name in living:
            match = _NAME.fullmatch(name)
            if match is not None and all(slot.name != name for slot in self._slots):
                self._append(name, Role(match[1]), is_new=False)
        for slot in reversed(self._slots[:]):
            if living and most is not None and len(self._slots) > most and slot.name not in living:
                self._slots.remove(slot)

    def drop(self, slot: WorkerSlot) -> None:
        self._slots.remove(slot)

    def _append(self, name: str, role: Role, is_new: bool) -> WorkerSlot:
        slot = WorkerSlot(name, role=role, pool=self._pools[role], is_new=is_new)
        self._slots.append(slot)
        return slot
