"""The host tier: blocks that the pool gave up come back with the same bytes, within a byte budget."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError
from engine.host_tier import HostTier
from engine.planes import CacheLayout, attention_layout
from engine.pool import SharedPool
from engine.types import EngineStats, Key
from tests.engine.tiny import random_prompt, random_weights, request, run, tiny_config, tiny_engine

LAYOUT = attention_layout(3, 2, 4, 4, "float32")
NUM_BLOCKS = 6


@pytest.fixture
def pool() -> SharedPool:
    pool = SharedPool(LAYOUT, NUM_BLOCKS)
    numbers = np.random.default_rng(0)
    for index, plane in enumerate(LAYOUT.planes):
        for block_id in range(NUM_BLOCKS):
            data = numbers.bytes(plane.bytes_per_block * plane.num_slots)
            pool.write(index, range(plane.num_slots), [block_id], memoryview(data))
    return pool


def block_bytes(pool: SharedPool, block_id: int, layout: CacheLayout = LAYOUT) -> bytes:
    planes = enumerate(layout.planes)
    return b"".join(pool.read(index, range(plane.num_slots), [block_id]) for index, plane in planes)


def tier_of(pool: SharedPool, num_blocks: int, folder: Path | None = None) -> HostTier:
    return HostTier(LAYOUT, pool, num_blocks * LAYOUT.bytes_per_block, folder)


# --- the tier alone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_file", [False, True])
def test_a_block_comes_back_to_another_place_byte_for_byte(pool: SharedPool, tmp_path: Path, in_file: bool) -> None:
    tier = tier_of(pool, 3, tmp_path if in_file else None)
    wanted = block_bytes(pool, 2)
    tier.save(b"a", 2)
    tier.save(b"b", 3)
    assert tier.find(b"a") and not tier.find(b"c")
    tier.load(b"a", 5)
    assert block_bytes(pool, 5) == wanted
    stats = tier.stats()
    assert (stats.num_blocks, stats.num_queries, stats.num_hits, stats.num_saves) == (2, 2, 1, 2)
    assert not list(tmp_path.iterdir()), "a file leaves no name behind"


def test_beyond_its_budget_it_forgets_the_least_recently_used(pool: SharedPool) -> None:
    tier = tier_of(pool, 2)
    tier.save(b"a", 0)
    tier.save(b"b", 1)
    tier.load(b"a", 5)
    tier.save(b"c", 2)
    assert [name for name in (b"a", b"b", b"c") if tier.find(name)] == [b"a", b"c"]


def test_pinned_blocks_are_not_displaced(pool: SharedPool) -> None:
    tier = tier_of(pool, 2)
    tier.save(b"a", 0)
    tier.save(b"b", 1)
    with tier.pinned([b"a", b"b"]):
        tier.save(b"c", 2)
    assert tier.find(b"a") and tier.find(b"b") and not tier.find(b"c")
    tier.save(b"c", 2)
    assert tier.find(b"c") and not tier.find(b"a")


@given(st.lists(st.tuples(st.sampled_from(["save", "load"]), st.integers(0, 9), st.integers(0, 5)), max_size=40))
def test_whatever_is_found_has_the_bytes_that_were_saved(steps: list[tuple[str, int, int]]) -> None:
    pool = SharedPool(LAYOUT, NUM_BLOCKS)
    tier = tier_of(pool, 3)
    saved: dict[bytes, bytes] = {}
    for number, (kind, which, block_id) in enumerate(steps):
        name = bytes([which])
        if kind == "load" and tier.find(name):
            tier.load(name, block_id)
            assert block_bytes(pool, block_id) == saved[name]
        elif kind == "save" and not tier.find(name):
            plane = LAYOUT.planes[0]
            data = bytes([number]) * (plane.bytes_per_block * plane.num_slots)
            pool.write(0, range(plane.num_slots), [block_id], memoryview(data))
            tier.save(name, block_id)
            saved[name] = block_bytes(pool, block_id)
    assert tier.stats().num_blocks <= 3
    pool.close()


def test_a_budget_below_one_block_or_a_folder_that_is_not_there_is_refused_by_name(pool: SharedPool) -> None:
    with pytest.raises(ConfigError, match="host_tier_bytes is 10") as small:
        HostTier(LAYOUT, pool, 10)
    assert small.value.param == "engine.host_tier_bytes"
    with pytest.raises(ConfigError, match="host_tier_folder /nowhere"):
        tier_of(pool, 1, Path("/nowhere"))


def test_a_folder_without_a_tier_is_refused() -> None:
    with pytest.raises(ValueError, match="host_tier_folder needs host_tier_bytes"):
        EngineConfig(host_tier_bytes=0, host_tier_folder="/tmp")


# --- in an engine ---------------------------------------------------------------------------------------------

CONFIG = tiny_config()
WEIGHTS = random_weights(CONFIG, seed=3)


def stats_after(engine: Engine) -> EngineStats:
    engine.begin()
    return engine.stats()


def test_prompts_that_the_pool_has_forgotten_are_found_in_the_tier() -> None:
    prompts = [random_prompt(CONFIG, 40, seed) for seed in range(4)]
    alone = tiny_engine(CONFIG, WEIGHTS, num_blocks=200)
    wanted = [run(alone.engine, alone.runner, [request("x", prompt)])[Key("x", 0)] for prompt in prompts]
    built = tiny_engine(CONFIG, WEIGHTS, num_blocks=14, host_tier_blocks=60)
    for name in ("first", "again"):
        for index, prompt in enumerate(prompts):
            asked = request(f"{name}{index}", prompt)
            assert run(built.engine, built.runner, [asked])[asked.key] == wanted[index]
    stats = stats_after(built.engine)
    assert stats.host_hits >= 4 * 9, "of each prompt's ten blocks all but the last are found"
    assert stats.prefix_hits >= 4 * 36
    assert 0 < stats.host_hits <= stats.host_queries and stats.host_saves > 0
    assert (stats.num_leaked_blocks, stats.num_free_blocks) == (0, 14)


def test_a_preempted_sequence_is_loaded_instead_of_computed_again() -> None:
    prompts = [random_prompt(CONFIG, 24, seed) for seed in range(3)]
    requests = [request(str(index), prompt, max_tokens=40) for index, prompt in enumerate(prompts)]
    plain = tiny_engine(CONFIG, WEIGHTS, num_blocks=26)
    wanted = run(plain.engine, plain.runner, requests)
    built = tiny_engine(CONFIG, WEIGHTS, num_blocks=26, host_tier_blocks=100)
    assert run(built.engine, built.runner, requests) == wanted
    stats = stats_after(built.engine)
    assert stats.num_preemptions > 0 and stats.host_hits > 0
    assert stats.num_leaked_blocks == 0


def test_a_tier_smaller_than_what_is_evicted_at_once_stays_right() -> None:
    prompts = [random_prompt(CONFIG, 44, seed) for seed in range(3)]
    big = tiny_engine(CONFIG, WEIGHTS, num_blocks=200)
    built = tiny_engine(CONFIG, WEIGHTS, num_blocks=14, host_tier_blocks=5)
    for round_number in range(3):
        for index, prompt in enumerate(prompts):
            asked = request(f"{round_number}-{index}", prompt)
            assert run(built.engine, built.runner, [asked]) == run(big.engine, big.runner, [asked])
    stats = stats_after(built.engine)
    assert stats.host_blocks <= 5 and stats.num_leaked_blocks == 0
