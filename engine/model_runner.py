"""The model runner: computes a batch with real tensors and samples from its logits."""

from __future__ import annotations

import torch

from engine.batch import build_input
from engine.errors import ModelError
from engine.kv_cache import KVCache
from engine.models.config import ModelConfig
from engine.models.llama import Llama, Weights, probe_weights
from engine.sampler import sample
from engine.scheduler import Batch
from kernels.reference.attention import tile_tokens
from kernels.reference.ladder import FREE, measure_ladder


class TorchRunner:
    """Implements engine.engine.ModelRunner over a model and its cache."""

    def __init__(self, model: Llama, cache: KVCache, block_size: int, device: str) -> None:
        self.model = model
        self.cache = cache
        self.block_size = block_size
        self.device = device

    @torch.inference_mode()
    def execute(self, batch: Batch) -> list[tuple[int, ...]]:
        if batch.copies:
            self.cache.copy(batch.copies)
        logits = iter(self.logits(batch).cpu().numpy())
        return [
            (sample(next(logits), item.sequence.request.sampling, item.start + item.num_new),) if item.samples else ()
            for item in batch.scheduled
        ]

    def logits(self, batch: Batch) -> torch.Tensor:
        """[items that sample, vocab] float32, in the batch's order."""
        groups = self.model.config.num_heads // self.model.config.num_kv_heads
        step = build_input(batch, self.block_size, groups, self.model.ladder, self.device)
        return self.model.forward(step, self.cache)


def build_model(config: ModelConfig, weights: Weights, block_size: int, batch_invariant: bool) -> Llama:
    """A Llama whose row counts keep results independent of the batch, if wanted. Empties `weights`.

    Raises ModelError if this machine cannot keep them so for weights of these shapes."""
    model = Llama(config, weights, FREE)
    if batch_invariant:
        try:
            model.ladder = measure_ladder(probe_weights(model), config.head_dim, tile_tokens(block_size))
        except ArithmeticError as error:
            raise ModelError(f"batch_invariant cannot be had for this model: {error}") from error
    return model
