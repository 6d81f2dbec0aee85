"""Builds a real engine: weights, KV tensors, model runner."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from engine.engine import Engine
from engine.host_tier import HostTier
from engine.kv_cache import DTYPES, KVCache
from engine.model_runner import TorchRunner, build_model
from engine.models.weights import load_weights
from engine.pool import BlockBytes, SharedPool
from engine.setup import EngineSetup


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    engine: Engine
    runner: TorchRunner
    cache: KVCache


def build_engine(setup: EngineSetup, pool: SharedPool | None) -> BuiltEngine:
    """Load the model and make its engine over `pool` (None: KV tensors of their own). Raises ModelError."""
    torch.set_num_threads(setup.config.threads)
    device, block_size = setup.config.device, setup.config.block_size
    weights = load_weights(setup.files, setup.model, DTYPES[setup.dtype])
    if device != "cpu":
        weights = {name: tensor.to(device) for name, tensor in weights.items()}
    with torch.inference_mode():
        model = build_model(setup.model, weights, block_size, setup.batch_invariant)
        cache = KVCache(setup.layout, setup.spec.num_blocks, device, pool)
    return BuiltEngine(
        Engine(setup.spec, _host_tier(setup, pool or cache)), TorchRunner(model, cache, block_size, device), cache
    )


def _host_tier(setup: EngineSetup, pool: BlockBytes) -> HostTier | None:
    config = setup.config
    if not config.host_tier_bytes or not config.prefix_cache:
        return None
    folder = Path(config.host_tier_folder).expanduser() if config.host_tier_folder else None
    return HostTier(setup.layout, pool, config.host_tier_bytes, folder)
