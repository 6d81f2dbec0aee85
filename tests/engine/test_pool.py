"""The KV pool: one memory, seen as tensors by the engine and as block records by a transfer."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from engine.kv_cache import KVCache
from engine.planes import CacheLayout, Group, Plane, Split, attention_layout, cohort_difference, layout_hash
from engine.pool import SharedPool

NUM_BLOCKS = 7
LAYOUTS = {
    "float32": attention_layout(3, 2, 8, 4, "float32"),
    "bfloat16": attention_layout(3, 2, 8, 4, "bfloat16"),
    "unequal planes": CacheLayout(
        (
            Plane("latent", 3, 4, (4, 12), "float32", Split.REPLICATED),
            Plane("rope", 2, 4, (4, 3), "bfloat16", Split.REPLICATED),
        ),
        block_size=4,
        groups=(Group((0, 1, 2)),),
    ),
}
BLOCKS = ([3], [0, 1, 2], [6, 2, 5, 0])  # one, neighbours, any order


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> CacheLayout:
    return LAYOUTS[request.param]


@pytest.fixture
def pool(layout: CacheLayout) -> Iterator[SharedPool]:
    pool = SharedPool(layout, NUM_BLOCKS)
    yield pool
    pool.close()


def places(layout: CacheLayout) -> list[tuple[int, range, list[int]]]:
    """(plane, layers, block ids) of some transfers."""
    return [
        (index, layers, block_ids)
        for index, plane in enumerate(layout.planes)
        for layers in (range(1), range(1, plane.num_slots), range(plane.num_slots))
        for block_ids in BLOCKS
    ]


def fill(cache: KVCache, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for plane in cache.planes.values():
        plane.copy_(torch.randn(plane.shape, generator=generator))


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_records_read_from_the_pool_are_the_bytes_of_the_tensors(layout: CacheLayout, pool: SharedPool) -> None:
    cache = KVCache(layout, NUM_BLOCKS, "cpu", pool)
    fill(cache)
    for plane, layers, block_ids in places(layout):
        tensor = cache.planes[layout.planes[plane].name][layers.start : layers.stop][:, block_ids]
        assert pool.read(plane, layers, block_ids) == cache.read(plane, layers, block_ids) == raw(tensor)


def test_records_written_into_the_pool_appear_in_the_tensors_and_nowhere_else(
    layout: CacheLayout, pool: SharedPool
) -> None:
    cache = KVCache(layout, NUM_BLOCKS, "cpu", pool)
    source = KVCache(layout, NUM_BLOCKS, "cpu", None)
    fill(source, seed=1)
    for plane, layers, block_ids in places(layout):
        fill(cache, seed=2)
        wanted = {name: tensor.clone() for name, tensor in cache.planes.items()}
        name = layout.planes[plane].name
        wanted[name][layers.start : layers.stop, block_ids] = source.planes[name][layers.start : layers.stop, block_ids]
        pool.write(plane, layers, block_ids, memoryview(source.read(plane, layers, block_ids)))
        assert all(torch.equal(cache.planes[name], wanted[name]) for name in wanted)


def test_blocks_may_lie_elsewhere_at_the_target(layout: CacheLayout, pool: SharedPool) -> None:
    """As a transfer does: device tensors to a shared pool, other ids, the same bytes."""
    source = KVCache(layout, NUM_BLOCKS, "cpu", None)
    fill(source, seed=3)
    back = KVCache(layout, NUM_BLOCKS, "cpu", None)
    for index, plane in enumerate(layout.planes):
        layers = range(plane.num_slots)
        pool.write(index, layers, [5, 0, 6], memoryview(source.read(index, layers, [1, 2, 4])))
        back.write(index, layers, [2, 4, 1], memoryview(pool.read(index, layers, [0, 6, 5])))
        tensor = back.planes[plane.name]
        assert torch.equal(tensor[:, [1, 2, 4]], source.planes[plane.name][:, [1, 2, 4]])
        assert not tensor[:, [0, 3, 5, 6]].any()


@pytest.mark.parametrize("change", [-1, 1, -8, 8, "one record more", "nothing"])
def test_a_payload_of_the_wrong_length_is_refused_and_changes_nothing(
    layout: CacheLayout, pool: SharedPool, change: int | str
) -> None:
    cache = KVCache(layout, NUM_BLOCKS, "cpu", pool)
    fill(cache)
    before = bytes(pool.memory)
    good = pool.read(0, range(2), [1, 2])
    record = layout.planes[0].bytes_per_block
    length = {"one record more": len(good) + record, "nothing": 0}.get(str(change))
    length = len(good) + int(change) if length is None else length
    payload = memoryview((good + bytes(record))[:length])
    for target in (pool, cache):
        with pytest.raises(ValueError, match="does not fit"):
            target.write(0, range(2), [1, 2], payload)
    assert bytes(pool.memory) == before


def test_a_second_mapping_of_the_same_pool_sees_the_same_bytes(layout: CacheLayout, pool: SharedPool) -> None:
    other = SharedPool(layout, NUM_BLOCKS, os.dup(pool.fd))
    record = bytes(range(256)) * layout.planes[0].bytes_per_block
    record = record[: layout.planes[0].bytes_per_block]
    other.write(0, range(1), [4], memoryview(record))
    assert pool.read(0, range(1), [4]) == record
    other.close()
    assert pool.read(0, range(1), [4]) == record


def test_a_new_pool_is_zero_and_as_long_as_its_layout_says(layout: CacheLayout, pool: SharedPool) -> None:
    assert pool.size_bytes == NUM_BLOCKS * layout.bytes_per_block == len(pool.memory)
    assert not any(bytes(pool.memory))


def test_block_offsets_tile_the_pool(layout: CacheLayout) -> None:
    spans = []
    for index, plane in enumerate(layout.planes):
        for layer, block in itertools.product(range(plane.num_slots), range(NUM_BLOCKS)):
            start = layout.block_offset(index, layer, block, NUM_BLOCKS)
            spans.append((start, start + plane.bytes_per_block))
    spans.sort()
    assert spans[0][0] == 0 and spans[-1][1] == NUM_BLOCKS * layout.bytes_per_block
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(spans))


def test_a_closed_pool_leaves_no_descriptor(layout: CacheLayout) -> None:
    before = os.listdir("/proc/self/fd")
    SharedPool(layout, NUM_BLOCKS).close()
    assert os.listdir("/proc/self/fd") == before


def test_copies_move_whole_blocks_in_all_planes(layout: CacheLayout, pool: SharedPool) -> None:
    cache = KVCache(layout, NUM_BLOCKS, "cpu", pool)
    fill(cache)
    before = {name: tensor.clone() for name, tensor in cache.planes.items()}
    cache.copy([(1, 0), (5, 6)])
    for name, tensor in cache.planes.items():
        assert torch.equal(tensor[:, [0, 6]], before[name][:, [1, 5]])
        assert torch.equal(tensor[:, 1:6], before[name][:, 1:6])


# --- the cohort -----------------------------------------------------------------------------------------------

GROUPS = (Group((0, 1)),)
PLANE = Plane("k", 2, 16, (2, 16, 8), "float32", Split.HEADS)
OTHER_PLANES = [
    replace(PLANE, name="v"), replace(PLANE, num_slots=3),
    replace(PLANE, tokens_per_block=8), replace(PLANE, block_shape=(2, 8, 16)), replace(PLANE, dtype="bfloat16"),
    replace(PLANE, split=Split.REPLICATED),
]  # fmt: skip


def test_the_layout_hash_changes_with_each_field() -> None:
    layout = CacheLayout((PLANE,), block_size=16, groups=GROUPS)
    layouts = [
        layout, replace(layout, block_size=8), replace(layout, planes=(PLANE, PLANE)),
        replace(layout, groups=(Group((0, 1), window=64),)), replace(layout, groups=(Group((0,)), Group((1,)))),
        *(replace(layout, planes=(plane,)) for plane in OTHER_PLANES),
    ]  # fmt: skip
    hashes = [layout_hash(each, "model", "revision") for each in layouts]
    hashes += [layout_hash(layout, "another", "revision"), layout_hash(layout, "model", "another")]
    assert len(set(hashes)) == len(hashes)


def test_layout_hashes_of_equal_layouts_are_equal_and_others_say_in_what_they_differ() -> None:
    layout = attention_layout(2, 2, 8, 16, "float32")
    first, second = (layout_hash(layout, "model", "r") for _ in range(2))
    assert first == second
    assert cohort_difference(first, second) == ""
    other = layout_hash(attention_layout(2, 2, 8, 16, "bfloat16"), "model", "s")
    assert cohort_difference(first, other) == "revision, dtype, planes"
    assert cohort_difference(first, "of another time") == (
        "wire, numerics, model, revision, block_size, dtype, planes, groups, of another time"
    )


def test_the_layout_hash_does_not_confuse_where_one_name_ends() -> None:
    layout = CacheLayout((PLANE,), block_size=16, groups=GROUPS)
    assert layout_hash(layout, "ab", "c") != layout_hash(layout, "a", "bc")
