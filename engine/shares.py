"""Shares: which heads, rows and columns each rank of a tensor-parallel worker has.

Rank r of n has the r-th of n runs as equal as can be, [r * K // n, (r + 1) * K // n); where there are fewer KV heads
than ranks, head r * K // n, which it shares with its neighbours, and its part of that head's query heads. So no size
need divide another, and the ranks that share a head are neighbours (never by a modulo).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from engine.errors import ModelError
from engine.planes import CacheLayout, Plane, Split


@dataclass(frozen=True, slots=True)
class Share:
    """One rank of `size`."""

    rank: int
    size: int

    def cut(self, total: int) -> range:
        """Its run of `total` rows or columns."""
        return range(self.rank * total // self.size, (self.rank + 1) * total // self.size)

    def kv_heads(self, total: int) -> range:
        """Its KV heads, at least one."""
        if total >= self.size:
            return self.cut(total)
        head = self.rank * total // self.size
        return range(head, head + 1)

    def query_heads(self, num_heads: int, num_kv_heads: int) -> range:
        """The query heads that it computes, all of them over its own KV heads."""
        groups, mine = num_heads // num_kv_heads, self.kv_heads(num_kv_heads)
        sharers = holders(mine.start, num_kv_heads, self.size)
        if num_kv_heads >= self.size:
            return range(mine.start * groups, mine.stop * groups)
        part = Share(sharers.index(self.rank), len(sharers)).cut(groups)
        return range(mine.start * groups + part.start, mine.start * groups + part.stop)


def holders(head: int, num_kv_heads: int, size: int) -> range:
    """The ranks, neighbours, that have this KV head."""
    ranks = [rank for rank in range(size) if head in Share(rank, size).kv_heads(num_kv_heads)]
    return range(ranks[0], ranks[-1] + 1)


def rank_plane(plane: Plane, share: Share) -> Plane:
    """What a rank stores of a plane."""
    if plane.split is Split.REPLICATED:
        return plane
    num_heads, *rest = plane.block_shape
    return replace(plane, block_shape=(len(share.kv_heads(num_heads)), *rest))


def rank_layout(layout: CacheLayout, share: Share) -> CacheLayout:
    """What a rank stores of a cache: blocks of the same ids, slots and groups."""
    return replace(layout, planes=tuple(rank_plane(plane, share) for plane in layout.planes))


def check_split(size: int, num_heads: int, num_kv_heads: int, intermediate_size: int) -> None:
    """Raises ModelError if a rank would have nothing to compute."""
    for rank in range(size):
        share = Share(rank, size)
        if not share.query_heads(num_heads, num_kv_heads):
            raise ModelError(
                f"tensor_parallel {size} is too much for {num_heads} query heads over {num_kv_heads} KV heads",
                param="tensor_parallel",
            )
        if not share.cut(intermediate_size):
            raise ModelError(
                f"tensor_parallel {size} is too much for {intermediate_size} columns", param="tensor_parallel"
            )
