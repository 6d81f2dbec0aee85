"""RankPools: the pools of all ranks of a worker as one, whose records are those of a worker of one rank.

Block ids are the same on every rank. A record of a split plane is put together from the ranks' heads, in their order; a
head that several ranks have is read from the first and written to each (engine/shares.py).
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence as BlockIds

import numpy as np

from engine.planes import CacheLayout, Split
from engine.pool import SharedPool, check_length
from engine.shares import Share, rank_layout


def pools_of(pool: SharedPool | RankPools) -> tuple[SharedPool, ...]:
    """Those of the ranks, in order."""
    return pool.pools if isinstance(pool, RankPools) else (pool,)


class RankPools:
    """Implements engine.pool.BlockBytes over one SharedPool for each rank."""

    def __init__(self, layout: CacheLayout, pools: tuple[SharedPool, ...]) -> None:
        """`layout` is of the whole cache."""
        self.layout = layout
        self.pools = pools
        self.num_blocks = pools[0].num_blocks

    @property
    def size_bytes(self) -> int:
        return sum(pool.size_bytes for pool in self.pools)

    def read(self, plane: int, layers: range, block_ids: BlockIds[int]) -> bytes:
        ids, width = list(block_ids), self.layout.planes[plane].bytes_per_block
        whole = np.empty((len(layers), len(ids), width), np.uint8)
        for rank, pool in reversed(list(enumerate(self.pools))):  # so that the first that has a head is read last
            where = self._bytes_of(plane, rank)
            whole[:, :, where] = pool.records(plane)[layers.start : layers.stop][:, ids]
        return whole.tobytes()

    def write(self, plane: int, layers: range, block_ids: BlockIds[int], payload: memoryview) -> None:
        check_length(self.layout.planes[plane], layers, block_ids, payload)
        ids = list(block_ids)
        whole = np.frombuffer(payload, np.uint8).reshape(len(layers), len(ids), -1)
        for rank, pool in enumerate(self.pools):
            pool.records(plane)[layers.start : layers.stop][:, ids] = whole[:, :, self._bytes_of(plane, rank)]

    def close(self) -> None:
        for pool in self.pools:
            pool.close()

    def _bytes_of(self, plane_index: int, rank: int) -> slice:
        """Where a rank's part lies in the whole record."""
        plane = self.layout.planes[plane_index]
        if plane.split is Split.REPLICATED:
            return slice(0, plane.bytes_per_block)
        num_heads = plane.block_shape[0]
        heads, head_bytes = Share(rank, len(self.pools)).kv_heads(num_heads), plane.bytes_per_block // num_heads
        return slice(heads.start * head_bytes, heads.stop * head_bytes)


def worker_pool(
    layout: CacheLayout, num_blocks: int, num_ranks: int, fds: BlockIds[int] = (), access: int = mmap.ACCESS_DEFAULT
) -> SharedPool | RankPools:
    """The pool of a worker of so many ranks: a new one, or what is behind these descriptors, one for each rank."""
    shares = [Share(rank, num_ranks) for rank in range(num_ranks)]
    pools = tuple(
        SharedPool(rank_layout(layout, share), num_blocks, fds[share.rank] if fds else None, access) for share in shares
    )
    return pools[0] if num_ranks == 1 else RankPools(layout, pools)
