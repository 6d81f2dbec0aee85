"""Workers of several ranks: each family's parts add up to the whole model, and processes that do it together."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.batch import plan_step
from engine.build import build_engine
from engine.config import EngineConfig, ModelSource
from engine.engine import Engine, EngineSpec
from engine.errors import ModelError, WorkerLost
from engine.kv_cache import KVCache
from engine.model_runner import TorchRunner, build_model
from engine.models.config import ModelConfig, MoeConfig
from engine.models.decoder import Weights
from engine.models.split import split_config, split_weights
from engine.planes import attention_layout
from engine.rank_pools import RankPools, worker_pool
from engine.scheduler import SchedulerLimits
from engine.setup import EngineSetup, plan_engine
from engine.shares import Share, rank_layout
from engine.step_plan import StepPlan
from engine.step_runner import ProcessStepRunner
from engine.types import Add
from kernels.reference.ladder import Ladders
from tests.engine.test_step_runner import (
    TIMEOUT_S,
    assert_no_child_runs,
    descriptors,
    generate,
    next_outputs,
    thread_runner,
)
from tests.engine.tiny import random_prompt, random_weights, request, run, tiny_config, tiny_engine

FAMILIES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "three KV heads": {"num_heads": 9, "num_kv_heads": 3, "hidden_size": 36},
    "one KV head": {"num_kv_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True, "tie_embeddings": True},
    "windows and sandwich norms": {
        "architecture": "Gemma3ForCausalLM", "sandwich_norms": True, "qk_norm": True, "wide_norms": True,
        "activation": "gelu_tanh", "layer_windows": (8, None), "local_rope_theta": 1000.0, "tie_embeddings": True,
    },
    "experts": {
        "architecture": "MixtralForCausalLM",
        "moe": MoeConfig(num_experts=4, experts_per_token=2, intermediate_size=24, normalize=True, layer_ids=(0, 1)),
    },
}  # fmt: skip


class ThreadRanks:
    """Implements engine.ranks.Ranks: ranks that are threads of one process and meet at a barrier."""

    def __init__(self, share: Share, barrier: threading.Barrier, parts: list[Any]) -> None:
        self.share = share
        self._barrier = barrier
        self._parts = parts

    def tell(self, plan: StepPlan) -> None:
        return

    def add(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._all(hidden)).sum(0)

    def gather(self, logits: torch.Tensor, width: int) -> torch.Tensor:
        whole = torch.cat(self._all(logits), dim=1)
        assert whole.shape[1] == width
        return whole

    def agree(self, ladders: Ladders) -> Ladders:
        assert all(one == ladders for one in self._all(ladders))
        return ladders

    def _all(self, part: Any) -> list[Any]:
        self._parts[self.share.rank] = part
        self._barrier.wait(TIMEOUT_S)
        parts = [*self._parts]
        self._barrier.wait(TIMEOUT_S)
        return parts


class SplitRunner:
    """Implements engine.engine.ModelRunner: all ranks compute each step, in threads."""

    def __init__(self, config: ModelConfig, weights: Weights, size: int, num_blocks: int, block_size: int) -> None:
        barrier, parts = threading.Barrier(size), [None] * size
        windows = config.layer_windows
        self.layout = attention_layout(
            config.num_layers, config.num_kv_heads, config.head_dim, block_size, "float32", windows
        )
        self._threads = ThreadPoolExecutor(size)
        ranks = [ThreadRanks(Share(rank, size), barrier, parts) for rank in range(size)]

        def build(one: ThreadRanks) -> TorchRunner:
            torch.set_num_threads(1)
            mine = split_weights(dict(weights), config, one.share)
            with torch.inference_mode():
                model = build_model(split_config(config, one.share), mine, block_size, False, one)
                cache = KVCache(rank_layout(self.layout, one.share), num_blocks, "cpu", None)
                cache.fill(float("nan"))
            return TorchRunner(model, cache, block_size)

        self._runners = list(self._threads.map(build, ranks))

    def execute(self, batch, stored=None):
        plan = StepPlan.decode(plan_step(batch, self.layout.groups, self.layout.block_size).encode())
        followed = [self._threads.submit(runner.compute, plan) for runner in self._runners[1:]]
        sampled = self._runners[0].execute(batch, stored)
        for one in followed:
            one.result()
        return sampled


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_of_a_model_give_the_tokens_of_the_whole(family: str, size: int) -> None:
    config = tiny_config(**FAMILIES[family])
    weights = random_weights(config, seed=3)
    requests = [
        request(f"r{index}", random_prompt(config, 5 + 9 * index, seed=index), max_tokens=6, logprobs=3)
        for index in range(4)
    ]
    whole = tiny_engine(config, weights, batch_invariant=False, prefill_chunk=16)
    wanted = run(whole.engine, whole.runner, requests)
    split = SplitRunner(config, weights, size, num_blocks=64, block_size=4)
    limits = SchedulerLimits(4, 512, 64, 16, groups=split.layout.groups)
    engine = Engine(EngineSpec(limits, 64, config.max_context, config.vocab_size, frozenset(), b"tiny"))
    assert run(engine, split, requests) == wanted


@given(st.lists(st.lists(st.integers(0, 2**31), max_size=5), min_size=10, max_size=10))
def test_a_plan_crosses_to_other_ranks_unchanged(arrays: list[list[int]]) -> None:
    plan = StepPlan(*(np.array(one, np.int64) for one in arrays))
    again = StepPlan.decode(plan.encode())
    assert all(np.array_equal(getattr(plan, name), getattr(again, name)) for name in StepPlan.__dataclass_fields__)


def test_more_ranks_than_query_heads_are_refused(tiny_llama: Callable[..., tuple[object, Path]]) -> None:
    _, folder = tiny_llama()
    with pytest.raises(ModelError, match="tensor_parallel 16 is too much for"):
        plan_engine(ModelSource(name=str(folder)), EngineConfig(), hash_key=b"key", num_ranks=16)


# --- processes ------------------------------------------------------------------------------------------------


@pytest.fixture
def setup(tiny_llama: Callable[..., tuple[object, Path]]) -> EngineSetup:
    _, folder = tiny_llama()
    config = EngineConfig(num_blocks=64, block_size=4, prefill_chunk=16, max_batch_tokens=32, host_tier_bytes=2**20)
    return plan_engine(ModelSource(name=str(folder)), config, hash_key=b"key", num_ranks=2)


@contextlib.asynccontextmanager
async def two_ranks(setup: EngineSetup) -> AsyncGenerator[tuple[ProcessStepRunner, RankPools]]:
    pool = worker_pool(setup.layout, setup.spec.num_blocks, setup.num_ranks)
    assert isinstance(pool, RankPools)
    try:
        runner = await ProcessStepRunner.start(setup, pool, TIMEOUT_S)
        try:
            yield runner, pool
        finally:
            await runner.stop()
    finally:
        pool.close()


def children_of(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


async def test_two_ranks_give_the_tokens_of_one_and_leave_nothing_behind(setup: EngineSetup) -> None:
    async with thread_runner(build_engine(replace(setup, num_ranks=1), None)) as thread:
        wanted = await generate(thread)
    before = descriptors()
    async with two_ranks(setup) as (runner, pool):
        assert await generate(runner) == wanted
        (follower,) = children_of(runner.pid)
        assert all(any(bytes(one.memory)) for one in pool.pools), "each rank's KV lies in memory that we see"
    with pytest.raises(ProcessLookupError):
        os.kill(follower, 0)
    await asyncio.sleep(0)
    assert descriptors() == before
    assert_no_child_runs()


@pytest.mark.parametrize("busy", [True, False])
async def test_a_rank_that_is_killed_is_the_end_of_the_worker(setup: EngineSetup, busy: bool) -> None:
    async with two_ranks(setup) as (runner, _):
        (follower,) = children_of(runner.pid)
        if busy:
            runner.send(Add(request("endless", [5], max_tokens=200, ignore_eos=True)))
            await next_outputs(runner, lambda outputs: outputs.tokens)
        os.kill(follower, signal.SIGKILL)
        with pytest.raises(WorkerLost, match=str(runner.pid)):
            await next_outputs(runner, lambda outputs: False)
    assert_no_child_runs()


async def test_the_others_end_when_the_first_rank_is_killed(setup: EngineSetup) -> None:
    async with two_ranks(setup) as (runner, _):
        (follower,) = children_of(runner.pid)
        end = os.pidfd_open(follower)
        os.kill(runner.pid, signal.SIGKILL)
        with pytest.raises(WorkerLost):
            await next_outputs(runner, lambda outputs: False)
        ended, _, _ = await asyncio.to_thread(select.select, [end], [], [], TIMEOUT_S)
        os.close(end)
        assert ended
