"""Loans: blocks of a known prefix that another worker copies into its own cache, and the prefix that it has then.

1. `lend` holds the blocks here for as long as they are read;
2. `keep` names those that were reserved there and have been written, and gives them to the cache.
Both ends list the blocks of `n` full blocks alike: transfer_entries of their positions.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.block_manager import BlockManager, Holder
from engine.block_table import transfer_entries
from engine.cached_prefix import longest_prefix
from engine.planes import Group
from engine.prefix import group_name
from engine.reservation import names_here, take


def lend(
    blocks: BlockManager, groups: Sequence[Group], block_size: int, holder: Holder, names: Sequence[bytes]
) -> tuple[int, list[int]]:
    """(of how many of these names, the blocks), now held; (0, []) if nothing is here or what is in the host tier finds
    no room."""
    count = longest_prefix(groups, block_size, names, len(names) * block_size + 1, blocks.is_known)
    entries = transfer_entries(groups, count * block_size, block_size)
    known = names_here(blocks, entries, names)
    block_ids = take(blocks, holder, len(entries), known) if count else None
    return (count, block_ids) if block_ids else (0, [])


def keep(
    blocks: BlockManager, entries: Sequence[tuple[int, int]], block_ids: Sequence[int], names: Sequence[bytes]
) -> None:
    """Name those blocks of a reservation that store a full block of this prefix."""
    for (group, index), block_id in zip(entries, block_ids, strict=True):
        if index < len(names):
            blocks.name(block_id, group_name(names[index], group))
