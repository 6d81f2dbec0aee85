"""Layers that are told of in the middle of a step: their bytes are there on every rank, and stay what they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.engine import Engine, ModelRunner
from engine.kv_cache import KVCache
from engine.layer_groups import WHOLE_STEPS, LayerGroups
from engine.planes import attention_layout
from engine.step_runner import compute
from engine.types import Abort, Add, Key, Progress, Request, StepOutputs
from tests.engine.test_ranks import SplitRunner
from tests.engine.tiny import random_prompt, random_weights, request, run, tiny_config, tiny_engine

NUM_LAYERS = 4
BLOCK = 4
CONFIG = tiny_config(num_layers=NUM_LAYERS)
EVERY_LAYER = LayerGroups(NUM_LAYERS, 1, 1)


@given(st.integers(1, 60), st.integers(1, 2**20), st.integers(0, 2**24), st.integers(0, 300))
def test_marks_end_with_the_last_layer_and_lie_a_group_apart(
    num_layers: int, layer_bytes: int, group_bytes: int, num_blocks: int
) -> None:
    marks = LayerGroups(num_layers, layer_bytes, group_bytes).marks(num_blocks)
    if not group_bytes or not num_blocks:
        assert not marks
        return
    assert (marks[-1], marks[0] > 0) == (num_layers, True)
    sizes = [after - before for before, after in zip([0, *marks], marks, strict=False)]
    assert all(size * num_blocks * layer_bytes >= group_bytes for size in sizes[1:])
    assert sizes[0] <= max(sizes[1:], default=num_layers)


def test_layers_with_windows_of_their_own_are_told_with_whole_steps() -> None:
    windows = [8, None] * 2
    assert LayerGroups.of(attention_layout(4, 1, 4, BLOCK, "float32", windows), 1) == WHOLE_STEPS
    assert LayerGroups.of(attention_layout(4, 1, 4, BLOCK, "float32"), 1).num_layers == 4


def test_slots_are_stored_when_they_are_in_every_group() -> None:
    layout = attention_layout(5, 1, 4, BLOCK, "float32", [8, 8, 8, None, None])
    assert [group.layer_ids for group in layout.groups] == [(0, 1), (2,), (3, 4)]
    assert [layout.num_slots_stored(count) for count in range(6)] == [0, 0, 0, 0, 1, 2]


class Told:
    """What an engine has told, with the bytes that were in the pools at that moment."""

    def __init__(self, engine: Engine, runner: ModelRunner, caches: list[KVCache]) -> None:
        self.engine = engine
        self.runner = runner
        self.caches = caches
        self.tokens: dict[Key, list[int]] = {}
        self.snapshots: list[tuple[Progress, list[bytes]]] = []
        self.final: dict[Key, tuple[int, ...]] = {}  # the blocks of each hand-off

    def take(self, outputs: StepOutputs) -> None:
        for output in outputs.tokens:
            self.tokens.setdefault(output.key, []).extend(output.token_ids)
        for progress in outputs.progress:
            if progress.num_layers is not None:
                self.snapshots.append((progress, self._bytes(progress.block_ids, progress.num_layers)))
            if progress.done:
                self.final[progress.key] = progress.block_ids

    def step(self) -> bool:
        batch = self.engine.begin()
        self.take(self.engine.take_outputs())
        if batch is None:
            return False
        self.engine.finish(batch, compute(self.runner, batch, self.engine.layer_news(batch), self.take))
        self.take(self.engine.take_outputs())
        return True

    def run(self, *requests: tuple[Request, bool]) -> None:
        for one, handoff in requests:
            self.engine.handle(Add(one, handoff))
        while self.step():
            pass

    def _bytes(self, block_ids: tuple[int, ...], num_layers: int) -> list[bytes]:
        planes = range(len(self.caches[0].layout.planes))
        return [cache.read(plane, range(num_layers), block_ids) for cache in self.caches for plane in planes]

    def check(self) -> None:
        """What was told is what the hand-off holds at its end."""
        for progress, was in self.snapshots:
            assert progress.num_layers is not None
            block_ids = self.final[progress.key][: len(progress.block_ids)]
            assert progress.block_ids == block_ids
            assert self._bytes(block_ids, progress.num_layers) == was


def told(**limits: Any) -> Told:
    built = tiny_engine(CONFIG, random_weights(CONFIG, seed=1), block_size=BLOCK, **limits)
    built.engine.spec = replace(built.engine.spec, layer_groups=EVERY_LAYER)
    return Told(built.engine, built.runner, [built.cache])


def prompts(*lengths: int) -> list[Request]:
    return [request(f"r{length}", random_prompt(CONFIG, length, seed=length), max_tokens=5) for length in lengths]


def layers_told(seen: Told, name: str) -> list[tuple[int, int | None]]:
    """(blocks, layers) of each telling."""
    return [(len(one.block_ids), one.num_layers) for one, _ in seen.snapshots if one.key.request_id == name]


def test_each_layer_of_each_chunk_is_told_with_the_blocks_that_the_chunk_fills() -> None:
    seen = told(prefill_chunk=10)
    seen.run((prompts(18)[0], True))
    assert layers_told(seen, "r18") == [(blocks, layers) for blocks in (2, 5) for layers in range(1, 5)]
    seen.check()


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_what_was_told_does_not_change_beside_others_and_after_hits(prefix_cache: bool) -> None:
    seen = told(prefill_chunk=8, max_batch_tokens=24, num_blocks=96, prefix_cache=prefix_cache)
    some = prompts(5, 16, 23, 30)
    seen.run(*((one, index != 1) for index, one in enumerate(some)))
    again = [replace(one, request_id=f"again-{one.request_id}") for one in some]
    longer = replace(again[2], request_id="longer", prompt_ids=(*again[2].prompt_ids, 1, 2, 3, 4, 5))
    seen.run(*((one, True) for one in (*again, longer)))
    assert len(seen.final) == 3 + 5
    assert {progress.key for progress, _ in seen.snapshots} == seen.final.keys()
    seen.check()


def test_tokens_are_those_of_whole_steps() -> None:
    seen, some = told(prefill_chunk=8), prompts(5, 16, 23)
    whole = tiny_engine(CONFIG, random_weights(CONFIG, seed=1), block_size=BLOCK)
    wanted = run(whole.engine, whole.runner, some)
    seen.run(*((one, True) for one in some))
    assert seen.tokens == {key: tokens[:1] for key, tokens in wanted.items()}


def test_nobodys_blocks_are_told_where_none_leaves() -> None:
    seen = told()
    seen.run((prompts(18)[0], False))
    assert seen.snapshots == []


def test_a_step_that_fills_no_block_tells_nothing() -> None:
    seen = told(prefill_chunk=2)
    seen.run((prompts(8)[0], True))
    assert [blocks for blocks, _ in layers_told(seen, "r8")] == [1] * 4 + [2] * 4


def test_an_engine_short_of_blocks_rewrites_nothing_that_was_told() -> None:
    """Decoding sequences are preempted around the hand-offs, and computed anew in other blocks."""
    seen = told(prefill_chunk=8, num_blocks=14, prefix_cache=False)
    long = [request(f"d{index}", random_prompt(CONFIG, 6, seed=index), max_tokens=14) for index in range(2)]
    seen.run(*((one, False) for one in long), *((one, True) for one in prompts(16, 12)))
    assert seen.engine.scheduler.num_preemptions > 0
    assert len(seen.final) == 2
    seen.check()


def test_an_aborted_prompt_is_told_no_more() -> None:
    seen = told(prefill_chunk=8)
    (one,) = prompts(30)
    seen.engine.handle(Add(one, handoff=True))
    seen.step()
    before = len(seen.snapshots)
    assert before
    seen.engine.handle(Abort(one.key))
    while seen.step():
        pass
    assert len(seen.snapshots) == before


@pytest.mark.parametrize("size", [2, 3])
def test_a_layer_that_is_told_is_stored_on_every_rank(size: int) -> None:
    """Each rank has written its heads before rank 0 has the sum of their attention."""
    config = tiny_config(num_layers=NUM_LAYERS)
    split = SplitRunner(config, random_weights(config, seed=3), size, num_blocks=64, block_size=BLOCK)
    built = tiny_engine(config, random_weights(config, seed=3), block_size=BLOCK, prefill_chunk=8)
    built.engine.spec = replace(built.engine.spec, layer_groups=EVERY_LAYER)
    seen = Told(built.engine, split, [runner.cache for runner in split._runners])
    seen.run(*((one, True) for one in prompts(5, 18)))
    assert len(layers_told(seen, "r18")) == 3 * NUM_LAYERS
    seen.check()
