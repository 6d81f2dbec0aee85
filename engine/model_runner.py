"""The model runner: computes a batch with real tensors and samples from its logits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from llguidance import LLTokenizer

from engine.batch import build_input, num_rows_of, num_states_of, plan_step
from engine.batch_sampler import BatchSampler
from engine.errors import ModelError
from engine.grammar import Grammars, Mask
from engine.kv_cache import KVCache
from engine.layer_groups import LayersStored
from engine.logits import process
from engine.logprobs import logprob_of
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder, Results, Weights
from engine.pooling import pool
from engine.ranks import ONE_RANK, Ranks
from engine.sampler import sample
from engine.scheduler import Batch, Scheduled
from engine.step_plan import StepPlan
from engine.types import ErrorInfo, Sampled, SamplingParams, TokenLogprob
from kernels.dispatch import Kernels, backend_for
from kernels.reference.quantized import Bits


class TorchRunner:
    """Implements engine.engine.ModelRunner over a model and its cache."""

    def __init__(self, model: Decoder, cache: KVCache, block_size: int, grammars: Grammars | None = None) -> None:
        """Without `grammars` no answer can keep to one."""
        self.model = model
        self.cache = cache
        self.block_size = block_size
        self._grammars = grammars or Grammars(_no_vocabulary)
        self._sampler = BatchSampler(model.backend)

    def execute(self, batch: Batch, stored: LayersStored | None = None) -> list[Sampled]:
        """As rank 0: the others compute the step, too."""
        plan = plan_step(batch, self.cache.layout.groups, self.block_size)
        self.model.ranks.tell(plan)
        return self.sampled(batch, self.compute(plan, stored))

    def sampled(self, batch: Batch, results: Results) -> list[Sampled]:
        """What is chosen after each item, or pooled of it. Waits for the device."""
        rows, states = results.logits.cpu(), results.states.cpu().numpy()
        masks = self._grammars.masks([item.sequence if item.samples else None for item in batch.scheduled])
        chosen = self._choose_together(batch, rows)
        return [
            Sampled(embedding=pool(item, own_states))
            if len(own_states)
            else self._sample(item, own_rows, mask, token_id)
            for item, token_id, mask, own_rows, own_states in zip(
                batch.scheduled,
                chosen,
                masks,
                _split(rows.numpy(), map(num_rows_of, batch.scheduled)),
                _split(states, map(num_states_of, batch.scheduled)),
                strict=True,
            )
        ]

    def _choose_together(self, batch: Batch, rows: torch.Tensor) -> list[int | None]:
        """The next token of each item, where it can be chosen with others; None: by itself."""
        chosen: list[int | None] = [None] * len(batch.scheduled)
        which = [
            index for index, item in enumerate(batch.scheduled) if item.samples and self._sampler.takes(item)
        ]  # fmt: skip
        if which:
            last = np.cumsum([num_rows_of(item) for item in batch.scheduled]) - 1
            wanted = rows if len(which) == len(rows) else rows[last[which]]
            tokens = self._sampler.choose(wanted, [batch.scheduled[index] for index in which])
            for index, token_id in zip(which, tokens.tolist(), strict=True):
                chosen[index] = token_id
        return chosen

    def _sample(self, item: Scheduled, rows: np.ndarray, mask: Mask, token_id: int | None) -> Sampled:
        """rows: [num_rows_of(item), vocab], of the item's last positions; token_id: if it is chosen already. The
        answers differ in their noise only."""
        if token_id is not None:
            return Sampled((token_id,))
        sequence, params = item.sequence, item.sequence.request.sampling
        prompt_logprobs = _prompt_logprobs(item, rows) if len(rows) > item.samples else ()
        if not item.samples:
            return Sampled(prompt_logprobs=prompt_logprobs)
        if isinstance(mask, ErrorInfo):
            return Sampled(error=mask)
        eos_token_ids = self.model.config.eos_token_ids
        processed = process(rows[-1], params, sequence.tokens, sequence.num_prompt, eos_token_ids, mask)
        first, *siblings = (_choose(item, rows[-1], processed, answer.sampling) for answer in sequence.answers)
        return replace(first, prompt_logprobs=prompt_logprobs, siblings=tuple(siblings))

    @torch.inference_mode()
    def compute(self, plan: StepPlan, stored: LayersStored | None = None) -> Results:
        """As many rows of each item as num_rows_of and num_states_of say, in the batch's order."""
        if len(plan.copies):
            self.cache.copy(plan.copies.reshape(-1, 2))
        model, groups = self.model, self.cache.layout.groups
        step = build_input(plan, groups, self.block_size, model.backend, model.attention)
        return model.forward(step, self.cache, stored)


def _split(rows: np.ndarray, counts: Iterable[int]) -> list[np.ndarray]:
    """The rows of each item, in order."""
    return np.split(rows, np.cumsum([*counts])[:-1])


def _no_vocabulary() -> LLTokenizer:
    raise ModelError("this engine was built without a vocabulary")


def _choose(item: Scheduled, logits: np.ndarray, processed: np.ndarray, params: SamplingParams) -> Sampled:
    token_id = sample(processed, params, item.start + item.num_new)
    logprobs = (logprob_of(logits, token_id, params.logprobs),) if params.logprobs >= 0 else ()
    return Sampled((token_id,), logprobs)


def _prompt_logprobs(item: Scheduled, rows: np.ndarray) -> tuple[TokenLogprob, ...]:
    """Of the prompt's tokens that follow the item's positions."""
    sequence = item.sequence
    following = sequence.tokens[item.start + 1 : min(item.start + item.num_new + 1, sequence.num_prompt)]
    num_top = sequence.request.sampling.prompt_logprobs
    return tuple(logprob_of(row, token_id, num_top) for row, token_id in zip(rows, following, strict=False))


def build_model(
    config: ModelConfig, weights: Weights, block_size: int, batch_invariant: bool, ranks: Ranks = ONE_RANK,
    kernels: Kernels = "auto", bits: Bits = 16,
) -> Decoder:  # fmt: skip
    """A model whose row counts keep results independent of the batch, if wanted. Empties `weights`. `bits`: of its
    linear layers' weights.

    Raises ModelError if this machine cannot keep them so for weights of these shapes."""
    backend = backend_for(weights["model.embed_tokens.weight"], kernels, batch_invariant)
    model = Decoder(config, weights, backend, ranks, bits)
    if batch_invariant:
        try:
            model.backend.settle(model.heads, block_size, ranks.agree)
        except ArithmeticError as error:
            raise ModelError(f"batch_invariant cannot be had for this model: {error}") from error
    return model
