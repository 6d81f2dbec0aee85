"""Tensor parallelism from outside: a rank's part of a model's configuration and weights (Megatron-LM, 2019).

Projections that read the hidden state are cut by rows (q, k, v by heads; gate and up by columns of the feed-forward
part, in each expert), those that write it by columns, embedding and output head by rows of the vocabulary. Norms and an
expert's router are whole on every rank. What ranks compute of one hidden state is added up (engine/ranks.py), so the
bias of a projection that writes it is kept by the first rank alone.
"""

from __future__ import annotations

import re
from dataclasses import replace

import torch

from engine.models.config import ModelConfig
from engine.shares import Share

_NAME = re.compile(r"(?:.*\.)?(\w+)\.(weight|bias)")
_ADDED = ("o_proj", "down_proj")  # whose results are added up
_VOCABULARY = ("embed_tokens", "lm_head")


def split_config(config: ModelConfig, share: Share) -> ModelConfig:
    """The model as one rank computes it; its vocabulary stays whole, for that is what tokens are chosen from."""
    moe = config.moe
    return replace(
        config,
        num_heads=len(share.query_heads(config.num_heads, config.num_kv_heads)),
        num_kv_heads=len(share.kv_heads(config.num_kv_heads)),
        intermediate_size=len(share.cut(config.intermediate_size)),
        moe=moe and replace(moe, intermediate_size=len(share.cut(moe.intermediate_size))),
    )


def split_weights(weights: dict[str, torch.Tensor], config: ModelConfig, share: Share) -> dict[str, torch.Tensor]:
    """One rank's part of all tensors; `config` is of the whole model. Copies, so that the whole ones can be freed."""
    if share.size == 1:
        return weights
    parts = {name: _part(name, weight, config, share) for name, weight in weights.items()}
    return {name: part for name, part in parts.items() if part is not None}


def _part(name: str, weight: torch.Tensor, config: ModelConfig, share: Share) -> torch.Tensor | None:
    matched = _NAME.fullmatch(name)
    assert matched is not None, name
    layer, kind = matched.groups()
    if layer in _ADDED and kind == "bias":
        return weight if share.rank == 0 else None
    rows, columns = _rows(layer, weight, config, share), _columns(layer, weight, config, share)
    if rows is not None:
        return weight[rows.start : rows.stop].clone()
    if columns is not None:
        return weight[:, columns.start : columns.stop].clone()
    return weight


def _rows(layer: str, weight: torch.Tensor, config: ModelConfig, share: Share) -> range | None:
    if layer == "q_proj":
        return _times(share.query_heads(config.num_heads, config.num_kv_heads), config.head_dim)
    if layer in ("k_proj", "v_proj"):
        return _times(share.kv_heads(config.num_kv_heads), config.head_dim)
    if layer in ("gate_proj", "up_proj", *_VOCABULARY):
        return share.cut(weight.shape[0])
    return None


def _columns(layer: str, weight: torch.Tensor, config: ModelConfig, share: Share) -> range | None:
    if layer == "o_proj":
        return _times(share.query_heads(config.num_heads, config.num_kv_heads), config.head_dim)
    return share.cut(weight.shape[1]) if layer == "down_proj" else None


def _times(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)
