"""Steps on a device that computes beside the processor. A step is launched, and its tokens are collected later.

1. `launch` sends the step's numbers and its kernels to the device, without waiting: where tokens can be chosen there
   (engine/batch_sampler.py), they are, and their copy to the processor is under way.
2. Another step may be launched after it before its tokens are known: it takes them where they are.
3. `collect` waits for the tokens of the step, not for what was launched since.
A step that only decodes is one launch of a captured graph (engine/decode_graphs.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from engine.batch import StepInput, build_input, plan_step
from engine.batch_sampler import BatchSampler
from engine.decode_graphs import DecodeGraphs
from engine.layer_groups import LayersStored
from engine.models.decoder import Results
from engine.scheduler import Batch
from engine.step_plan import StepPlan
from engine.types import Sampled

if TYPE_CHECKING:
    from engine.model_runner import TorchRunner  # its grammars' library is not there on every machine that computes


@dataclass(frozen=True, slots=True)
class Launched:
    """A step that is being computed. tokens: what it samples, in the order of its items, on the device and, once
    `is_there` has come, in `copied`; None where they are chosen on the processor, from its results."""

    batch: Batch
    results: Results
    tokens: torch.Tensor | None
    copied: torch.Tensor | None
    is_there: torch.cuda.Event | None


class DeviceRunner:
    """Implements engine.step_runner.AheadRunner over a runner's model and cache."""

    def __init__(self, runner: TorchRunner, graphs: DecodeGraphs | None) -> None:
        self._runner = runner
        self._graphs = graphs
        self._sampler = BatchSampler(runner.model.backend)

    def execute(self, batch: Batch, stored: LayersStored | None = None) -> list[Sampled]:
        return self.collect(self.launch(batch, stored))

    def can_follow(self, launched: Launched, batch: Batch) -> bool:
        """Could `batch`, which is the same items one position further, be launched now?"""
        return launched.tokens is not None and all(map(self._sampler.takes, batch.scheduled))

    @torch.inference_mode()
    def launch(self, batch: Batch, stored: LayersStored | None = None, after: Launched | None = None) -> Launched:
        """after: the step whose tokens these items have as their last ones, item by item."""
        plan = plan_step(batch, self._runner.cache.layout.groups, self._runner.block_size)
        results = self._compute(plan, stored, None if after is None else after.tokens)
        if not all(map(self._sampler.takes, batch.scheduled)):
            return Launched(batch, results, None, None, None)
        tokens = self._sampler.choose(results.logits, [item for item in batch.scheduled if item.samples])
        if tokens.device.type != "cuda":
            return Launched(batch, results, tokens, tokens, None)
        copied = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        copied.copy_(tokens, non_blocking=True)
        is_there = torch.cuda.Event()
        is_there.record()
        return Launched(batch, results, tokens, copied, is_there)

    def collect(self, launched: Launched) -> list[Sampled]:
        if launched.copied is None:
            return self._runner.sampled(launched.batch, launched.results)
        if launched.is_there is not None:
            launched.is_there.synchronize()
        tokens = iter(launched.copied.tolist())
        return [Sampled((next(tokens),)) if item.samples else Sampled() for item in launched.batch.scheduled]

    def _compute(self, plan: StepPlan, stored: LayersStored | None, tokens: torch.Tensor | None) -> Results:
        runner = self._runner
        if len(plan.copies):
            runner.cache.copy(plan.copies.reshape(-1, 2))
        if self._graphs is not None and self._graphs.takes(plan):
            return self._graphs.run(plan, tokens)
        model, groups = runner.model, runner.cache.layout.groups
        step = build_input(plan, groups, runner.block_size, model.backend, model.attention)
        return model.forward(_with_tokens(step, tokens), runner.cache, stored)


def _with_tokens(step: StepInput, tokens: torch.Tensor | None) -> StepInput:
    """The step with these as the tokens that its sampled rows compute."""
    if tokens is None:
        return step
    return replace(step, token_ids=step.token_ids.index_copy(0, step.sample_rows[: step.num_samples], tokens))
