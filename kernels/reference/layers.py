"""The pointwise parts of a transformer layer, and storing KV into blocks."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last axis, in float32 (Zhang and Sennrich, 2019)."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, halves convention. x: [tokens, heads, head_dim]; cos, sin: [tokens, 1, head_dim / 2]."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up. x: [tokens, 2 * width], gate first -> [tokens, width].

    Not F.silu: on a CPU its last bits depend on where the memory is cut among threads and vectors. exp's do not."""
    gate, up = x.chunk(2, dim=-1)
    wide = gate.float()
    return (wide / wide.neg().exp_().add_(1)).to(x.dtype) * up


def store_kv(cache: torch.Tensor, new: torch.Tensor, block_ids: torch.Tensor, offsets: torch.Tensor) -> None:
    """Write new[i] ([tokens, heads, dim]) to cache[block_ids[i], :, offsets[i]] ([blocks, heads, block_size, dim])."""
    cache[block_ids, :, offsets] = new


def copy_blocks(plane: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """Copy whole blocks in every layer. plane: [layers, blocks, ...]."""
    plane[:, targets] = plane[:, sources]
