"""Chooses tokens where the logits are, so that the next step need not wait until they have come to the processor.

It takes what many requests want at once: the greatest, or a draw at a temperature among those that top-k, top-p and
min-p leave. The tokens are engine/sampler.py's. What depends on the answer so far (a grammar, penalties, bans), or
tells logprobs, is chosen on the processor.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np
import torch

from engine.batch import num_states_of
from engine.logits import changes
from engine.scheduler import Scheduled
from engine.types import SamplingParams
from kernels.backend import Backend
from kernels.reference.truncation import keep_top


class DeviceSampler:
    """Over a backend that chooses (kernels.backend.Choose)."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def takes(self, items: Items[Scheduled]) -> bool:
        """Can all that these sample be chosen here?"""
        return self._backend.choose is not None and all(_is_plain(item) for item in items)

    def choose(self, logits: torch.Tensor, items: Items[Scheduled]) -> torch.Tensor:
        """logits: [as many as items sample, vocab] float32, in their order -> [the same] int64 on the device."""
        sampling = [item for item in items if item.samples]
        params = [item.sequence.answers[0].sampling for item in sampling]
        is_cut = any(_is_cut(one) for one in params)
        placed = self._backend.place([
            np.array([one.temperature for one in params], np.float64),
            np.array([_key(one) for one in params], np.uint64).view(np.int64),
            np.array([item.start + item.num_new for item in sampling], np.int64),
            *(_bounds(params) if is_cut else ()),
        ])  # fmt: skip
        temperatures, keys, positions, *bounds = placed
        if is_cut:
            scale = torch.where(temperatures > 0, temperatures, 1.0)[:, None]
            logits = keep_top(logits.double() / scale, *bounds)
            temperatures = (temperatures > 0).double()
        assert self._backend.choose is not None
        return self._backend.choose(logits, temperatures, keys, positions)


def _is_plain(item: Scheduled) -> bool:
    sequence, params = item.sequence, item.sequence.answers[0].sampling
    if sequence.is_joint or num_states_of(item) or params.prompt_logprobs >= 0:
        return False
    num_generated = item.start + item.num_new - sequence.num_prompt
    changed = params.grammar or params.logprobs >= 0 or params.typical_p < 1 or changes(params, num_generated)
    return not (item.samples and changed)


def _is_cut(params: SamplingParams) -> bool:
    return params.temperature > 0 and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)


def _bounds(params: list[SamplingParams]) -> list[np.ndarray]:
    """As keep_top takes them; a greedy row keeps its greatest in any case."""
    return [
        np.array([one.top_k for one in params], np.int64),
        np.array([one.top_p for one in params], np.float64),
        np.array([one.min_p for one in params], np.float64),
    ]


def _key(params: SamplingParams) -> int:
    return params.seed ^ (params.choice << 32)
