"""The feed-forward part of a layer: one gated MLP, or a mixture of experts that are such MLPs.

A backend may compute a layer's experts at once; where it does not, they are computed here, one by one. A token's result
does not depend on the rest of the batch: the rows of each expert are padded as the backend wants, and what a token's
experts give is added up in rising order of expert id.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels.backend import Backend, Linear, Mixture, Routing


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
    mixture: Mixture

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.mixture(x, self.router(x))


@dataclass(frozen=True, slots=True)
class OneByOne:
    """Implements kernels.backend.Mixture with a backend's Linears. Waits for the device: a step's rows of an expert are
    as many as they are."""

    experts: tuple[Mlp, ...]
    routing: Routing
    backend: Backend

    def __call__(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        weights, expert_ids = route(logits, self.routing.per_row, self.routing.normalize)
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert_id, expert in enumerate(self.experts):
            rows, choices = torch.nonzero(expert_ids == expert_id, as_tuple=True)
            if len(rows) == 0:
                continue
            padded = F.pad(x[rows], (0, 0, 0, self.backend.pad(len(rows)) - len(rows)))
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
