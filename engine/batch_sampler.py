"""Chooses the next tokens of many sequences at once, where the logits are.

It takes what many requests want: the greatest, or a draw at a temperature among those that top-k, top-p and min-p
leave. The tokens are engine/sampler.py's, which goes row by row, and keeps what is rare: answers with a grammar,
penalties, bans, logprobs, typical-p, and several answers to one prompt.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np
import torch

from engine.batch import num_states_of
from engine.logits import changes
from engine.scheduler import Scheduled
from engine.types import SamplingParams
from kernels.backend import Backend, Draws


class BatchSampler:
    """Over a backend's Choose, where it has one."""

    def __init__(self, backend: Backend) -> None:
        self._choose = backend.choose

    def takes(self, item: Scheduled) -> bool:
        """Can it be chosen here, if the item samples at all?"""
        if self._choose is None:
            return False
        sequence, params = item.sequence, item.sequence.answers[0].sampling
        if sequence.is_joint or num_states_of(item) or params.prompt_logprobs >= 0:
            return False
        num_generated = item.start + item.num_new - sequence.num_prompt
        is_rare = params.grammar or params.logprobs >= 0 or params.typical_p < 1 or changes(params, num_generated)
        return not (item.samples and is_rare)

    def choose(self, logits: torch.Tensor, items: Items[Scheduled]) -> torch.Tensor:
        """logits: [len(items), vocab] float32, of items that sample -> [len(items)] int64, where the logits are."""
        assert self._choose is not None
        params = [item.sequence.answers[0].sampling for item in items]
        return self._choose(logits, draws_of(params, [item.start + item.num_new for item in items]))


def draws_of(params: Items[SamplingParams], positions: Items[int]) -> Draws:
    """positions: of the new tokens."""
    return Draws(
        temperatures=np.array([one.temperature for one in params], np.float64),
        top_k=np.array([one.top_k for one in params], np.int64),
        top_p=np.array([one.top_p for one in params], np.float64),
        min_p=np.array([one.min_p for one in params], np.float64),
        keys=np.array([one.seed ^ (one.choice << 32) for one in params], np.uint64).view(np.int64),
        positions=np.array(positions, np.int64),
    )
