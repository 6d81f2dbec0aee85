"""Builds a real engine: weights, KV tensors, model runner."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from llguidance import LLTokenizer

from engine.calibration import warm_up
from engine.config import Quantization
from engine.engine import Engine, ModelRunner
from engine.grammar import Grammars, read_vocabulary
from engine.host_tier import HostTier
from engine.kv_cache import DTYPES, KVCache
from engine.model_runner import TorchRunner, build_model
from engine.models.split import split_config, split_weights
from engine.models.tokenizer import load_tokenizer
from engine.models.weights import load_weights
from engine.pinned import pin
from engine.pool import BlockBytes, SharedPool
from engine.ranks import ONE_RANK, Ranks
from engine.ring import RingPool, StagingRing
from engine.setup import EngineSetup
from engine.shares import rank_layout
from kernels.reference.quantized import Bits

logger = logging.getLogger(__name__)
_BITS: dict[Quantization, Bits] = {"none": 16, "int8": 8, "int4": 4}


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """steps: what computes the engine's steps, over `runner`'s model and cache."""

    engine: Engine
    runner: TorchRunner
    cache: KVCache
    steps: ModelRunner


def build_engine(setup: EngineSetup, pool: SharedPool | None) -> BuiltEngine:
    """Load the model and make its engine over `pool` (None: KV tensors of their own). Raises ModelError."""
    runner = build_model_runner(setup, pool)
    engine = Engine(setup.spec, host_tier(setup, pool or runner.cache))
    return BuiltEngine(engine, runner, runner.cache, _steps(setup, runner))


def _steps(setup: EngineSetup, runner: TorchRunner) -> ModelRunner:
    if setup.config.device == "cpu":
        return runner
    from engine.decode_graphs import CudaCapture, DecodeGraphs, can_capture  # these need Triton
    from engine.device_runner import DeviceRunner

    graphs = None
    if can_capture(runner.model):
        limits = setup.spec.limits
        graphs = DecodeGraphs(runner.model, runner.cache, limits.block_size, limits.max_batch_seqs, CudaCapture())
        with torch.inference_mode():
            graphs.prepare(lambda count, total: logger.info("captured %d of %d decode graphs", count, total))
    steps = DeviceRunner(runner, graphs)
    warm_up(setup.spec, steps, time.perf_counter)
    return steps


def build_model_runner(setup: EngineSetup, pool: SharedPool | None, ranks: Ranks = ONE_RANK) -> TorchRunner:
    """One rank's part of the model over its pool. Raises ModelError."""
    torch.set_num_threads(setup.config.threads)
    device, block_size, share = setup.config.device, setup.config.block_size, ranks.share
    weights = split_weights(load_weights(setup.files, setup.model, DTYPES[setup.dtype]), setup.model, share)
    if device != "cpu":
        weights = {name: tensor.to(device) for name, tensor in weights.items()}
    with torch.inference_mode():
        model = build_model(
            split_config(setup.model, share), weights, block_size, setup.batch_invariant, ranks, setup.config.kernels,
            _BITS[setup.quantization],
        )  # fmt: skip
        cache = KVCache(rank_layout(setup.layout, share), setup.spec.num_blocks, device, pool)
    return TorchRunner(model, cache, block_size, grammars_of(setup))


def grammars_of(setup: EngineSetup) -> Grammars:
    """Of this model. Its vocabulary is read when the first answer with a grammar comes: a second for 128,000 tokens."""

    def read() -> LLTokenizer:
        tokenizer = load_tokenizer(setup.files, setup.model)
        vocab_size = max(setup.model.vocab_size, tokenizer.vocab_size)
        return read_vocabulary(tokenizer.to_json(), vocab_size, setup.spec.eos_token_ids)

    return Grammars(read, setup.config.threads)


def behind_ring(cache: KVCache, ring: StagingRing, device: str) -> RingPool:
    """The cache as transfers see it, which read and write it through this ring. Raises ModelError."""
    return RingPool(cache, ring) if device == "cpu" else RingPool(cache, ring, pin(ring.memory))


def host_tier(setup: EngineSetup, pool: BlockBytes) -> HostTier | None:
    """Where evicted blocks of all ranks go, if that is wanted. Raises ConfigError."""
    config = setup.config
    if not config.host_tier_bytes or not config.prefix_cache:
        return None
    folder = Path(config.host_tier_folder).expanduser() if config.host_tier_folder else None
    return HostTier(setup.layout, pool, config.host_tier_bytes, folder)
