"""Load a model's tensors, from safetensors or GGUF, under the names that Hugging Face's Llama uses.

1. `expected_shapes` says from the config alone which tensors there must be.
2. `iterate_tensors` reads them one by one from memory-mapped files; of GGUF it undoes the quantisation, llama.cpp's
   names, and llama.cpp's order of the rows of q and k.
3. `load_weights` compares the two: nothing missing, nothing unknown, every shape right.
It knows no device: the model moves what it is given. A tensor of safetensors that already has the wanted type stays a
view of the mapped file, which processes on one machine share.
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
from engine.models.store import ModelFiles, ModelKind

_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")  # old checkpoints carry it; it follows from the config

_GGUF_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_GGUF_IGNORED = ("rope_freqs.weight",)  # read into the config


def load_weights(files: ModelFiles, config: ModelConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every tensor of the model, contiguous on the CPU in `dtype`; `lm_head.weight` only if it is not tied.

    Raises ModelError that names the tensor, the file, and both shapes where they differ."""
    expected = expected_shapes(config)
    weights: dict[str, torch.Tensor] = {}
    for name, tensor, path in iterate_tensors(files, config, dtype):
        if _IGNORED.fullmatch(name) or (name == "lm_head.weight" and config.tie_embeddings):
            continue
        if name not in expected:
            raise ModelError(f"{path}: the model has no place for tensor {name} {list(tensor.shape)}", param=name)
        if tuple(tensor.shape) != expected[name]:
            raise ModelError(
                f"{path}: tensor {name} has shape {list(tensor.shape)}, the configuration says {list(expected[name])}",
                param=name,
            )
        weights[name] = tensor
    for name, shape in expected.items():
        if name not in weights:
            raise ModelError(f"{files.path}: tensor {name} {list(shape)} is missing", param=name)
    return weights


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by name; a projection's weight is [out_features, in_features]."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    layer = _layer_shapes(config)
    for index in range(config.num_layers):
        shapes.update((f"model.layers.{index}.{name}", shape) for name, shape in layer.items())
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def _layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    for group, projections, has_bias in (
        ("self_attn", attention, config.attention_bias),
        ("mlp", mlp, config.mlp_bias),
    ):
        for name, shape in projections.items():
            shapes[f"{group}.{name}.weight"] = shape
            if has_bias:
                shapes[f"{group}.{name}.bias"] = shape[:1]
    return shapes


def iterate_tensors(
    files: ModelFiles, config: ModelConfig, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor, Path]]:
    """Yield (name, tensor, file) for everything in the model's files, in the order it lies there."""
    if files.kind is ModelKind.GGUF:
        yield from _iterate_gguf(files.path, config, dtype)
        return
    for path in files.weight_files:
        yield from _iterate_safetensors(path, dtype)


def _iterate_safetensors(path: Path, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor, Path]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                yield name, file.get_tensor(name).to(dtype).contiguous(), path
    except (SafetensorError, OSError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error


# --- GGUF -----------------------------------------------------------------------------------------------------


def _iterate_gguf(path: Path, config: ModelConfig, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor, Path]]:
    data = np.memmap(path, dtype=np.uint8, mode="r")
    for tensor in read_gguf(path).tensors.values():
        if tensor.name in _GGUF_IGNORED:
            continue
        name = canonical_name(tensor.name)
        if name is None:
            raise ModelError(f"{path}: unknown tensor {tensor.name} {list(tensor.shape)}", param=tensor.name)
        value = _dequantized(data, tensor, path).to(dtype)
        yield name, _restore_rope_order(name, value, config), path


def canonical_name(gguf_name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor, e.g. blk.0.attn_q.weight; None for one that Llama does not have."""
    block = _GGUF_BLOCK.fullmatch(gguf_name)
    if block:
        layer, part, suffix = block.groups()
        return f"model.layers.{layer}.{_GGUF_LAYER[part]}.{suffix}" if part in _GGUF_LAYER else None
    part, _, suffix = gguf_name.rpartition(".")
    return f"{_GGUF_TOP[part]}.{suffix}" if part in _GGUF_TOP else None


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
    if not name.endswith(("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias")):
        return value
    num_heads = config.num_heads if ".q_proj." in name else config.num_kv_heads
    if value.shape[0] != num_heads * config.head_dim:
        return value  # of the wrong shape, which load_weights reports
    paired = value.reshape(num_heads, config.head_dim // 2, 2, *value.shape[1:])
    return paired.transpose(1, 2).reshape(value.shape)
