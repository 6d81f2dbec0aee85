"""Block tables: which block stores which positions of a sequence, per group of layers.

A group's table covers the blocks from `first` on: where queries see only a window, the blocks before it were given
back. Everything here counts blocks by their index in the sequence: block i stores positions [i * size, (i + 1) * size).
"""

from __future__ import annotations

from collections.abc import Sequence as Groups
from dataclasses import dataclass, field

from engine.planes import Group


@dataclass(slots=True)
class BlockTable:
    """`ids[n]` is the block that stores index `first + n`."""

    first: int = 0
    ids: list[int] = field(default_factory=list)

    @property
    def stop(self) -> int:
        """One past the last index that has a block."""
        return self.first + len(self.ids)

    def __getitem__(self, index: int) -> int:
        assert index >= self.first, f"block {index} has left the window, which begins at {self.first}"
        return self.ids[index - self.first]


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)


def first_needed(group: Group, position: int, block_size: int) -> int:
    """Index of the first block that a query at `position`, or any later one, looks at."""
    return 0 if group.window is None else max(0, position - group.window + 1) // block_size


def transfer_entries(groups: Groups[Group], num_tokens: int, block_size: int) -> list[tuple[int, int]]:
    """What crosses of a sequence whose first `num_tokens` positions are computed: (group, index) pairs, by index, then
    by group. Blocks that the next token does not see stay behind. So both ends of a transfer count alike, and what is
    computed first comes first."""
    firsts = [first_needed(group, num_tokens, block_size) for group in groups]
    return [
        (group, index)
        for index in range(min(firsts), num_blocks_for(num_tokens, block_size))
        for group in range(len(groups))
        if index >= firsts[group]
    ]
