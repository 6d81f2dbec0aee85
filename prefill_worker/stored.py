"""Stored: which records of a request's blocks hold their bytes for good, and which of these are new.

Blocks are counted as frames count them, in the order of engine.block_table.transfer_entries; slots as planes do. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Stored:
    """All slots of the blocks before `num_whole`, and the first `num_slots` of those from there to `num_blocks`, which
    the present step fills."""

    num_whole: int = 0
    num_blocks: int = 0
    num_slots: int = 0

    @classmethod
    def whole(cls, num_blocks: int) -> Stored:
        return cls(num_blocks, num_blocks)

    def slots_of(self, block: int, all_slots: int) -> int:
        """How many of its first slots."""
        if block < self.num_whole:
            return all_slots
        return self.num_slots if block < self.num_blocks else 0


NOTHING = Stored()


def newly_stored(before: Stored, now: Stored, all_slots: int) -> Iterator[tuple[range, range]]:
    """(blocks, slots) that are stored now and were not before, each record once."""
    bounds = sorted((before.num_whole, before.num_blocks, now.num_whole, now.num_blocks))
    for start, stop in pairwise([0, *bounds]):
        slots = range(before.slots_of(start, all_slots), now.slots_of(start, all_slots))
        if start < stop and slots:
            yield range(start, stop), slots
