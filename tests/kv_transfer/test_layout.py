"""Layout plans: any two tensor-parallel sizes, heads cut or shared, planes split or whole."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from engine.planes import CacheLayout, Group, Plane, Split
from engine.pool import BlockBytes
from engine.rank_pools import RankPools, pools_of, worker_pool
from engine.shares import Share, check_split, holders
from kv_transfer.copying import copy_frame
from kv_transfer.layout import plan_slices, planned_bytes

SIZES = HEADS = (1, 2, 4, 8)
BLOCK = 3  # tokens
NUM_BLOCKS = 5


def layout_of(num_kv_heads: int, split: Split) -> CacheLayout:
    """Keys with scales beside them, or a latent that every rank has."""
    if split is Split.REPLICATED:
        planes = (Plane("latent", 2, BLOCK, (BLOCK, 7), "uint8", split),)
    else:
        planes = (
            Plane("k", 2, BLOCK, (num_kv_heads, BLOCK, 5), "uint8", split),
            Plane("scale", 2, BLOCK, (num_kv_heads, BLOCK), "float32", split),
        )
    return CacheLayout(planes, BLOCK, (Group((0, 1)),))


def filled(pool: BlockBytes, layout: CacheLayout, seed: int) -> list[bytes]:
    """Random bytes in all blocks; what each plane then holds."""
    numbers = np.random.default_rng(seed)
    for index, plane in enumerate(layout.planes):
        size = plane.bytes_per_block * plane.num_slots * NUM_BLOCKS
        pool.write(index, range(plane.num_slots), range(NUM_BLOCKS), memoryview(numbers.bytes(size)))
    return contents(pool, layout)


def contents(pool: BlockBytes, layout: CacheLayout) -> list[bytes]:
    return [pool.read(index, range(plane.num_slots), range(NUM_BLOCKS)) for index, plane in enumerate(layout.planes)]


@pytest.mark.parametrize("split", Split)
@pytest.mark.parametrize("num_kv_heads", HEADS)
@pytest.mark.parametrize(("num_source", "num_target"), list(itertools.product(SIZES, SIZES)))
def test_each_byte_of_each_target_rank_is_written_once_and_is_right(
    num_source: int, num_target: int, num_kv_heads: int, split: Split
) -> None:
    layout = layout_of(num_kv_heads, split)
    source, target = (worker_pool(layout, NUM_BLOCKS, size) for size in (num_source, num_target))
    wanted = filled(source, layout, seed=num_source)
    moved = 0
    for index, plane in enumerate(layout.planes):
        slices = plan_slices(plane, num_source, num_target)
        moved += plane.num_slots * sum(one.size_bytes for one in slices)
        for rank, pool in enumerate(pools_of(target)):
            runs = sorted((one.target_start, one.size_bytes) for one in slices if one.target_rank == rank)
            ends = [start + size for start, size in runs]
            assert [start for start, _ in runs] == [0, *ends[:-1]]
            assert ends[-1] == pool.layout.planes[index].bytes_per_block
        ids = (4, 0, 1, 2, 3)
        arrived = b"".join(map(bytes, copy_frame(source, target, index, range(plane.num_slots), ids, ids)))
        assert arrived == source.read(index, range(plane.num_slots), ids)
    assert moved == planned_bytes(layout, num_target) == sum(pool.layout.bytes_per_block for pool in pools_of(target))
    assert contents(target, layout) == wanted
    for rank, pool in enumerate(pools_of(target)):
        check_copies(pool, target, rank, num_kv_heads, split)
    source.close()
    target.close()


def check_copies(pool: BlockBytes, target: object, rank: int, num_kv_heads: int, split: Split) -> None:
    """Ranks that have the same heads hold the same bytes: reading all of them sees the first one only."""
    if not isinstance(target, RankPools):
        return
    same = range(len(target.pools)) if split is Split.REPLICATED else range(0)
    if split is Split.HEADS and num_kv_heads < len(target.pools):
        same = holders(Share(rank, len(target.pools)).kv_heads(num_kv_heads).start, num_kv_heads, len(target.pools))
    for other in same:
        assert contents(pool, target.pools[other].layout) == contents(target.pools[other], target.pools[other].layout)


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(9, 3), (8, 2), (8, 8), (16, 1), (24, 3), (7, 7)])
def test_all_query_heads_are_computed_once_over_their_own_kv_head(size: int, num_heads: int, num_kv_heads: int) -> None:
    shares = [Share(rank, size) for rank in range(size)]
    queries = [share.query_heads(num_heads, num_kv_heads) for share in shares]
    if any(not heads for heads in queries):
        with pytest.raises(Exception, match="tensor_parallel"):
            check_split(size, num_heads, num_kv_heads, intermediate_size=64)
        return
    assert [head for heads in queries for head in heads] == list(range(num_heads))
    groups = num_heads // num_kv_heads
    for share, heads in zip(shares, queries, strict=True):
        mine = share.kv_heads(num_kv_heads)
        assert sorted({head // groups for head in heads}) == list(mine)
        assert len(heads) % len(mine) == 0, "each KV head of a rank has equally many query heads there"


def test_shared_heads_are_asked_of_different_source_ranks() -> None:
    plane = layout_of(1, Split.HEADS).planes[0]
    slices = plan_slices(plane, num_source=4, num_target=4)
    assert [one.source_rank for one in slices] == [0, 1, 2, 3]
    whole = layout_of(1, Split.REPLICATED).planes[0]
    assert [one.source_rank for one in plan_slices(whole, 2, 4)] == [0, 0, 1, 1]
