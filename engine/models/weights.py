"""Load a model's tensors, from safetensors or GGUF, under the names that Hugging Face's families use.

Names are those of Llama; experts have Qwen3-MoE's (mlp.gate, mlp.experts.0.up_proj), for Mixtral, too. A norm's weight
is what it multiplies by: Gemma's checkpoints hold one less (its GGUF files do not).

1. `expected_shapes` says from the config alone which tensors there must be.
2. `iterate_tensors` reads them one by one from memory-mapped files, under our names.
3. `load_weights` compares the two: nothing missing, nothing unknown, every shape right.
It knows no device: the model moves what it is given. A tensor of safetensors that already has the wanted type stays a
view of the mapped file, which processes on one machine share until a model packs it (kernels/dispatch.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from engine.errors import ModelError
from engine.models.config import ModelConfig
from engine.models.store import ModelFiles, ModelKind
from engine.models.weights_gguf import iterate_gguf

_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")  # old checkpoints carry it; it follows from the config

_BARE = ("embed_tokens.", "layers.", "norm.")
_MIXTRAL_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_MIXTRAL_EXPERT = re.compile(r"(.*\.)block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight")


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
    for index in range(config.num_layers):
        layer = _norm_shapes(config) | _attention_shapes(config) | _feed_forward_shapes(config, index)
        shapes.update((f"model.layers.{index}.{name}", shape) for name, shape in layer.items())
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def _norm_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    names = ["input_layernorm", "post_attention_layernorm"]
    if config.sandwich_norms:
        names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (config.hidden_size,) for name in names}
    if config.qk_norm:
        shapes |= {f"self_attn.{name}.weight": (config.head_dim,) for name in ("q_norm", "k_norm")}
    return shapes


def _attention_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, q, kv = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qkv = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden)}
    shapes = _projection_shapes("self_attn.", qkv, config.attention_bias or config.qkv_bias)
    return shapes | _projection_shapes("self_attn.", {"o_proj": (hidden, q)}, config.attention_bias)


def _feed_forward_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    if config.moe is None or not config.has_experts(layer):
        return _mlp_shapes("mlp.", config.hidden_size, config.intermediate_size, config.mlp_bias)
    shapes: dict[str, tuple[int, ...]] = {"mlp.gate.weight": (config.moe.num_experts, config.hidden_size)}
    for index in range(config.moe.num_experts):
        shapes |= _mlp_shapes(f"mlp.experts.{index}.", config.hidden_size, config.moe.intermediate_size, False)
    return shapes


def _mlp_shapes(prefix: str, hidden: int, inner: int, has_bias: bool) -> dict[str, tuple[int, ...]]:
    parts = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return _projection_shapes(prefix, parts, has_bias)


def _projection_shapes(
    prefix: str, projections: dict[str, tuple[int, int]], has_bias: bool
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}{name}.weight": shape for name, shape in projections.items()}
    if has_bias:
        shapes |= {f"{prefix}{name}.bias": shape[:1] for name, shape in projections.items()}
    return shapes


def iterate_tensors(
    files: ModelFiles, config: ModelConfig, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor, Path]]:
    """Yield (name, tensor, file) for everything in the model's files, in the order it lies there."""
    if files.kind is ModelKind.GGUF:
        yield from iterate_gguf(files.path, config, dtype)
        return
    for path in files.weight_files:
        for name, tensor in _iterate_safetensors(path):
            if config.architecture == "Gemma3ForCausalLM" and name.endswith("norm.weight"):
                tensor = tensor.float() + 1  # left in float32: bfloat16 would lose the digits of a small weight
            else:
                tensor = tensor.to(dtype).contiguous()
            yield hf_name(name), tensor, path


def hf_name(name: str) -> str:
    """Our name of a tensor in a Hugging Face checkpoint: Mixtral's differ, and those of a model without its head."""
    name = f"model.{name}" if name.startswith(_BARE) else name
    expert = _MIXTRAL_EXPERT.fullmatch(name)
    if expert:
        prefix, index, part = expert.groups()
        return f"{prefix}mlp.experts.{index}.{_MIXTRAL_PARTS[part]}.weight"
    return name.replace(".block_sparse_moe.gate.", ".mlp.gate.")


def _iterate_safetensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
