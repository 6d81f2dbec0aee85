"""The feed-forward part of a layer: one gated MLP, or a mixture of experts that are such MLPs.

A token's result does not depend on the rest of the batch: the rows of each expert are padded as the backend wants,
and what a token's experts give is added up in rising order of expert id.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.models.config import ModelConfig
from kernels.backend import Backend, Linear


@dataclass(frozen=True, slots=True)
class Mlp:
    """down(act(gate(x)) * up(x))."""

    gate_up: Linear  # gated: hidden -> intermediate
    down: Linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.gate_up(x))


@dataclass(frozen=True, slots=True)
class Experts:
    """Mlps of which a router picks a few for each token."""

    router: Linear  # hidden -> num_experts
    experts: tuple[Mlp, ...]


def feed_forward(x: torch.Tensor, part: Mlp | Experts, config: ModelConfig, backend: Backend) -> torch.Tensor:
    """x: [as many rows as the backend wants, hidden] -> the same shape."""
    return part(x) if isinstance(part, Mlp) else _mixture(x, part, config, backend)


def _mixture(x: torch.Tensor, part: Experts, config: ModelConfig, backend: Backend) -> torch.Tensor:
    assert config.moe is not None
    logits = part.router(x)
    weights, expert_ids = route(logits, config.moe.experts_per_token, config.moe.normalize)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert_id, expert in enumerate(part.experts):
        rows, choices = torch.nonzero(expert_ids == expert_id, as_tuple=True)
        if len(rows) == 0:
            continue
        padded = F.pad(x[rows], (0, 0, 0, backend.pad(len(rows)) - len(rows)))
        result = expert(padded)[: len(rows)]
        out[rows] += result.float() * weights[rows, choices, None]
    return out.to(x.dtype)


def route(logits: torch.Tensor, experts_per_token: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, num_experts] -> weights (float32) and ids, both [rows, experts_per_token], greatest first.

    Softmax over all experts, then the greatest ones; of equal ones the lower id. `normalize`: they add up to one."""
    wide = logits.float()
    powers = (wide - wide.amax(dim=-1, keepdim=True)).exp_()
    shares, ids = (powers / powers.sum(dim=-1, keepdim=True)).sort(dim=-1, descending=True, stable=True)
    shares, ids = shares[:, :experts_per_token], ids[:, :experts_per_token]
    return (shares / shares.sum(dim=-1, keepdim=True) if normalize else shares), ids
