"""Tensors of a GGUF file: dequantised, under our names, rows of q and k in Hugging Face's order.

Stacked experts, [num_experts, out, in], are handed out one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from engine.errors import ModelError
from engine.models.config import ModelConfig
from engine.models.gguf_file import GgufTensor, read_gguf

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
_SANDWICH = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_IGNORED = ("rope_freqs.weight",)  # read into the config
_REORDERED = ("LlamaForCausalLM", "MixtralForCausalLM")  # whose rows of q and k llama.cpp's converter permutes


def iterate_gguf(path: Path, config: ModelConfig, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor, Path]]:
    """Yield (name, tensor, file) for every tensor of `path`. Raises ModelError for one that no family here has."""
    data = np.memmap(path, dtype=np.uint8, mode="r")
    for tensor in read_gguf(path).tensors.values():
        if tensor.name in _IGNORED:
            continue
        name = canonical_name(tensor.name, config)
        if name is None:
            raise ModelError(f"{path}: unknown tensor {tensor.name} {list(tensor.shape)}", param=tensor.name)
        value = _dequantized(data, tensor, path)
        if not (config.wide_norms and name.endswith("norm.weight")):  # bfloat16 would lose the digits of a small one
            value = value.to(dtype)
        if "{expert}" in name:
            for expert, part in enumerate(value):
                yield name.format(expert=expert), part, path
        else:
            yield name, _restore_rope_order(name, value, config), path


def canonical_name(gguf_name: str, config: ModelConfig) -> str | None:
    """Our name of a GGUF tensor, e.g. blk.0.attn_q.weight, with {expert} in that of stacked ones; None if unknown."""
    block = _BLOCK.fullmatch(gguf_name)
    if block is None:
        part, _, suffix = gguf_name.rpartition(".")
        return f"{_TOP[part]}.{suffix}" if part in _TOP else None
    layer, part, suffix = block.groups()
    if part in _EXPERTS:
        return f"model.layers.{layer}.mlp.experts.{{expert}}.{_EXPERTS[part]}.{suffix}"
    names = _LAYER | _SANDWICH if config.sandwich_norms else _LAYER
    return f"model.layers.{layer}.{names[part]}.{suffix}" if part in names else None


def _dequantized(data: np.ndarray, tensor: GgufTensor, path: Path) -> torch.Tensor:
    """One tensor, [*tensor.shape]: in its own type if that is F16, F32 or F64, else in float32."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType(tensor.type_id)
    raw = data[tensor.start : tensor.start + tensor.size_bytes]
    try:
        if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.F64):
            plain = raw.view({"F32": "<f4", "F16": "<f2", "F64": "<f8"}[kind.name])
            return torch.from_numpy(plain.copy()).reshape(tensor.shape)
        rows = raw.reshape(*tensor.shape[:-1], -1)  # [..., bytes of a row]
        return torch.from_numpy(dequantize(rows, kind)).reshape(tensor.shape)
    except (NotImplementedError, ValueError) as error:
        raise ModelError(f"{path}: tensor {tensor.name} of type {kind.name} cannot be read: {error}") from error


def _restore_rope_order(name: str, value: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Undo the order of q and k rows: llama.cpp pairs dimensions (2i, 2i + 1), Hugging Face (i, i + head_dim / 2)."""
    projections = ("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias")
    if config.architecture not in _REORDERED or not name.endswith(projections):
        return value
    num_heads = config.num_heads if ".q_proj." in name else config.num_kv_heads
    if value.shape[0] != num_heads * config.head_dim:
        return value  # of the wrong shape, which load_weights reports
    paired = value.reshape(num_heads, config.head_dim // 2, 2, *value.shape[1:])
    return paired.transpose(1, 2).reshape(value.shape)
