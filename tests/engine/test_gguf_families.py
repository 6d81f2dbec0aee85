"""GGUF files of each family and of each quantised type: written with the gguf package, loaded by us."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import _type_traits

from engine.models.config import ModelConfig, MoeConfig, RopeScaling
from engine.models.decoder import Weights
from engine.models.loader import load_config
from engine.models.store import resolve
from engine.models.weights import load_weights
from tests.engine.tiny import random_weights, tiny_config

FAMILIES = {
    "mistral": tiny_config(layer_windows=(16, 16)),
    "mixtral": tiny_config(
        architecture="MixtralForCausalLM", moe=MoeConfig(4, 2, 24, normalize=True, layer_ids=(0, 1))
    ),
    "qwen2": tiny_config(architecture="Qwen2ForCausalLM", qkv_bias=True, tie_embeddings=True),
    "qwen3": tiny_config(
        architecture="Qwen3ForCausalLM", qk_norm=True, head_dim=16, max_context=1024,
        rope_scaling=RopeScaling("yarn", 4.0, original_max_context=256, attention_factor=0.1 * np.log(4.0) + 1),
    ),
    "qwen3moe": tiny_config(
        architecture="Qwen3MoeForCausalLM", qk_norm=True, moe=MoeConfig(4, 2, 24, normalize=True, layer_ids=(0, 1))
    ),
    "gemma3": tiny_config(
        architecture="Gemma3ForCausalLM", num_layers=7, qk_norm=True, tie_embeddings=True, activation="gelu_tanh",
        sandwich_norms=True, wide_norms=True, embedding_scale=32**0.5, rope_theta=1e6, local_rope_theta=10_000.0,
        layer_windows=(16, 16, 16, 16, 16, None, 16), rope_scaling=RopeScaling("linear", 8.0),
    ),
}  # fmt: skip
LLAMAS = ("mistral", "mixtral")  # llama.cpp knows no other name for them
ARCHS = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}


def write(path: Path, name: str, config: ModelConfig, weights: Weights) -> Path:
    """With the package's own keys and its own map from Hugging Face's names."""
    architecture = "llama" if name in LLAMAS else name
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_context_length(config.max_context)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(config.rope_scaling.kind))
        writer.add_rope_scaling_factor(config.rope_scaling.factor)
        writer.add_rope_scaling_orig_ctx_len(config.rope_scaling.original_max_context)
    if config.layer_windows:
        writer.add_sliding_window(next(window for window in config.layer_windows if window is not None))
    if config.moe is not None:
        writer.add_expert_count(config.moe.num_experts)
        writer.add_expert_used_count(config.moe.experts_per_token)
        writer.add_expert_feed_forward_length(config.moe.intermediate_size)
    names = gguf.get_tensor_name_map(ARCHS[architecture], config.num_layers)
    for tensor_name, tensor in stacked(config, weights).items():
        found = names.get_name(tensor_name, try_suffixes=(".weight", ".bias"))
        assert found is not None, tensor_name
        paired = architecture == "llama" and ("q_proj" in tensor_name or "k_proj" in tensor_name)
        writer.add_tensor(found, (pair_rows(tensor, config.head_dim) if paired else tensor).numpy())
    finish(writer)
    return path


def pair_rows(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows i and i + head_dim / 2 of each head side by side, as llama.cpp's converter has them for this family."""
    order = torch.arange(head_dim).view(2, -1).T.flatten()
    return weight.view(-1, head_dim, weight.shape[1])[:, order].reshape(weight.shape).contiguous()


def stacked(config: ModelConfig, weights: Weights) -> Weights:
    """Experts as llama.cpp's converter stacks them, [num_experts, out, in]."""
    found = dict(weights)
    for layer in config.moe.layer_ids if config.moe is not None else ():
        for part in ("gate_proj", "up_proj", "down_proj"):
            mine = [name for name in found if name.startswith(f"model.layers.{layer}.mlp.experts.") and part in name]
            found[f"model.layers.{layer}.mlp.experts.{part}.weight"] = torch.stack([found.pop(name) for name in mine])
    return found


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_s_file_reads_as_the_model_that_was_written(name: str, tmp_path: Path) -> None:
    config = FAMILIES[name]
    weights = random_weights(config, seed=4)
    files = resolve(str(write(tmp_path / "model.gguf", name, config, weights)))
    ours = load_config(files)
    assert ours.rms_norm_eps == pytest.approx(config.rms_norm_eps)
    for field in ModelConfig.__slots__:
        if field != "rms_norm_eps":
            assert getattr(ours, field) == getattr(config, field), field
    loaded = load_weights(files, ours, torch.float32)
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[key], weights[key]) for key in weights)


def test_norms_that_multiply_in_float32_stay_in_it(tmp_path: Path) -> None:
    config = FAMILIES["gemma3"]
    weights = random_weights(config, seed=4)
    files = resolve(str(write(tmp_path / "model.gguf", "gemma3", config, weights)))
    for key, loaded in load_weights(files, load_config(files), torch.bfloat16).items():
        wanted = weights[key] if key.endswith("norm.weight") else weights[key].bfloat16()
        assert loaded.dtype == wanted.dtype and torch.equal(loaded, wanted)


@pytest.mark.parametrize("kind", _type_traits, ids=lambda kind: kind.name)
def test_every_type_that_the_package_can_dequantise_loads(kind: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    config = tiny_config(architecture="Qwen2ForCausalLM", qkv_bias=True, num_layers=1, hidden_size=256, vocab_size=8)
    weights = random_weights(config, seed=6)
    name, shape = "model.embed_tokens.weight", (8, 256)
    try:
        raw = gguf.quants.quantize(weights[name].numpy(), kind)
    except NotImplementedError:  # the package reads this type only; small bytes keep its half-precision scales finite
        elements, size_bytes = gguf.GGML_QUANT_SIZES[kind]
        raw = np.random.default_rng(2).integers(0, 60, (8, 256 // elements * size_bytes), dtype=np.uint8)
    wanted = gguf.quants.dequantize(raw, kind).reshape(shape)
    assert np.isfinite(wanted).all()
    path = write(tmp_path / "plain.gguf", "qwen2", config, weights)
    replace_tensor(path, tmp_path / "model.gguf", "token_embd.weight", raw, kind)
    files = resolve(str(tmp_path / "model.gguf"))
    assert np.array_equal(load_weights(files, load_config(files), torch.float32)[name].numpy(), wanted)


def replace_tensor(source: Path, target: Path, name: str, raw: np.ndarray, kind: gguf.GGMLQuantizationType) -> None:
    """Write `source` again with one tensor in another type."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "qwen2")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        if tensor.name == name:
            writer.add_tensor(name, raw, raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    finish(writer)
