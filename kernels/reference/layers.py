"""The pointwise parts of a transformer layer, and storing KV into blocks."""

from __future__ import annotations

import math

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, wide: bool = False) -> torch.Tensor:
    """Root-mean-square norm over the last axis, in float32 (Zhang and Sennrich, 2019).

    `wide`: the product with the weight is in float32, too, and rounded last."""
    full = x.float()
    scale = torch.rsqrt(full.square().mean(dim=-1, keepdim=True) + eps)
    if wide:
        return (full * scale * weight.float()).to(x.dtype)
    return weight * (full * scale).to(x.dtype)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, halves convention. x: [tokens, heads, head_dim]; cos, sin: [tokens, 1, head_dim / 2]."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up. x: [tokens, 2 * width], gate first -> [tokens, width].

    Not F.silu: on a CPU its last bits depend on where the memory is cut among threads and vectors. exp's do not."""
    gate, up = x.chunk(2, dim=-1)
    wide = gate.float()
    divisor = wide.neg().exp_().add_(1)
    return torch.div(wide, divisor, out=divisor).to(x.dtype).mul_(up)


def gelu_tanh_and_mul(x: torch.Tensor) -> torch.Tensor:
    """gelu(gate) * up with gelu's tanh approximation (Hendrycks and Gimpel, 2016). Shapes as in silu_and_mul.

    g (1 + tanh u) / 2 = g / (1 + exp(-2u)) with u = sqrt(2 / pi) (g + 0.044715 g^3): exp for silu_and_mul's reason."""
    gate, up = x.chunk(2, dim=-1)
    wide = gate.float()
    inner = (wide.square().mul_(0.044715).add_(1)).mul_(wide).mul_(-2 * math.sqrt(2 / math.pi))
    divisor = inner.exp_().add_(1)
    return torch.div(wide, divisor, out=divisor).to(x.dtype).mul_(up)


GATES = {"silu": silu_and_mul, "gelu_tanh": gelu_tanh_and_mul}


def store_kv(cache: torch.Tensor, new: torch.Tensor, block_ids: torch.Tensor, offsets: torch.Tensor) -> None:
    """Write new[i] ([tokens, heads, dim]) to cache[block_ids[i], :, offsets[i]] ([blocks, heads, block_size, dim])."""
    cache[block_ids, :, offsets] = new


def copy_blocks(plane: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """Copy whole blocks in every layer. plane: [layers, blocks, ...]."""
    plane[:, targets] = plane[:, sources]
