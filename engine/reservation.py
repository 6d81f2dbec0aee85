"""Reservations: blocks for a sequence whose KV is written from outside, but for those that are here under its names.

1. `names_here`  finds which of the wanted blocks the pool or the host tier has;
2. `num_taken`   says how many of the available blocks it would take to hold them all;
3. `take`        shares or loads what is here and allocates the rest, or takes nothing.
A block that is here has a name, so nobody writes to it again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from engine.block_manager import BlockManager, Holder
from engine.block_table import num_blocks_for, transfer_entries
from engine.planes import Group
from engine.prefix import group_name
from engine.runs import Runs


@dataclass(frozen=True, slots=True)
class Held:
    """Blocks of a hand-off, or of a reservation for `num_tokens` positions and the token after them. Those of a
    reservation in `present` were here before it, and may have other holders."""

    block_ids: tuple[int, ...]
    num_tokens: int
    present: Runs = ()
    num_answers: int = 0  # of a reservation: that will decode here
    tpot_s: float = math.inf  # that these were promised


def reserve_entries(groups: Sequence[Group], num_tokens: int, block_size: int) -> list[tuple[int, int]]:
    """(group, index) of what is transferred of these positions, then of what the next token needs beside it."""
    stop, more = num_blocks_for(num_tokens, block_size), num_blocks_for(num_tokens + 1, block_size)
    beside = [(group, index) for index in range(stop, more) for group in range(len(groups))]
    return transfer_entries(groups, num_tokens, block_size) + beside


def names_here(blocks: BlockManager, entries: Sequence[tuple[int, int]], hashes: Sequence[bytes]) -> dict[int, bytes]:
    """Names of the entries (group, index) that are here, by their numbers. `hashes` name the full blocks."""
    names = {
        number: group_name(hashes[index], group) for number, (group, index) in enumerate(entries) if index < len(hashes)
    }
    return {number: name for number, name in names.items() if blocks.is_known(name)}


def num_taken(blocks: BlockManager, count: int, names: Mapping[int, bytes]) -> int:
    """Of `count` blocks all but those that somebody holds already: a cached one is available until it is shared."""
    found = map(blocks.find, names.values())
    return count - sum(block_id is not None and bool(blocks.holders(block_id)) for block_id in found)


def take(blocks: BlockManager, holder: Holder, count: int, names: Mapping[int, bytes]) -> list[int] | None:
    """`count` blocks in order, those with a name with the bytes of it; None (nothing held) if they do not fit."""
    found = {number: blocks.find(name) for number, name in names.items()}
    shared = [block_id for block_id in found.values() if block_id is not None]
    cold = [name for number, name in names.items() if found[number] is None]
    blocks.share(holder, shared)
    with blocks.cold.pinned(cold) if blocks.cold and cold else nullcontext():
        fresh = blocks.allocate(holder, count - len(shared))
        if fresh is None:
            blocks.free(holder, shared)
            return None
        rest = iter(fresh)
        block_ids = [next(rest) if (here := found.get(number)) is None else here for number in range(count)]
        for number, name in names.items():
            if found[number] is None:
                _load(blocks, name, block_ids[number])
    return block_ids


def _load(blocks: BlockManager, name: bytes, block_id: int) -> None:
    assert blocks.cold is not None, "what the pool does not have was found in the host tier"
    blocks.cold.load(name, block_id)
    blocks.name(block_id, name)
