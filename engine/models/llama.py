"""The Llama family: RMSNorm, rotary grouped-query attention, gated SiLU. Weights under their Hugging Face names."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from engine.batch import StepInput
from engine.kv_cache import KVCache
from engine.models.config import ModelConfig, RopeScaling
from kernels.reference.attention import paged_attention
from kernels.reference.ladder import RowLadder, linear
from kernels.reference.layers import apply_rope, rms_norm, silu_and_mul, store_kv

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class LlamaLayer:
    """One layer. Projections that read the same input are stacked: [out, in]."""

    input_norm: torch.Tensor
    qkv: torch.Tensor  # [(num_heads + 2 * num_kv_heads) * head_dim, hidden]
    qkv_bias: torch.Tensor | None
    out: torch.Tensor  # [hidden, num_heads * head_dim]
    out_bias: torch.Tensor | None
    post_norm: torch.Tensor
    gate_up: torch.Tensor  # [2 * intermediate, hidden]
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor  # [hidden, intermediate]
    down_bias: torch.Tensor | None


class Llama:
    """forward: a step's tokens -> logits of its sampled rows. Writes the new KV, reads all of it from the cache."""

    def __init__(self, config: ModelConfig, weights: Weights, ladder: RowLadder) -> None:
        self.config = config
        self.ladder = ladder
        self.embedding = weights["model.embed_tokens.weight"]  # [vocab, hidden]
        self.head = self.embedding if config.tie_embeddings else weights["lm_head.weight"]
        self.norm = weights["model.norm.weight"]
        self.layers = [_layer(weights, index) for index in range(config.num_layers)]
        self.cos, self.sin = rope_tables(config, self.embedding.device)

    def forward(self, step: StepInput, cache: KVCache) -> torch.Tensor:
        """Returns [num_samples, vocab] in float32."""
        hidden = self.embedding[step.token_ids]  # [padded_rows, hidden]
        cos, sin = self.cos[step.positions][:, None], self.sin[step.positions][:, None]
        for index, layer in enumerate(self.layers):
            normed = rms_norm(hidden, layer.input_norm, self.config.rms_norm_eps)
            hidden = hidden + self._attend(index, layer, normed, cos, sin, step, cache)
            normed = rms_norm(hidden, layer.post_norm, self.config.rms_norm_eps)
            gated = silu_and_mul(linear(normed, layer.gate_up, layer.gate_up_bias, self.ladder))
            hidden = hidden + linear(gated, layer.down, layer.down_bias, self.ladder)
        rows = rms_norm(hidden[step.sample_rows], self.norm, self.config.rms_norm_eps)
        return linear(rows, self.head, None, self.ladder)[: step.num_samples].float()

    def _attend(
        self, index: int, layer: LlamaLayer, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
        step: StepInput, cache: KVCache,
    ) -> torch.Tensor:  # fmt: skip
        config, count = self.config, step.num_tokens
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        qkv = linear(x, layer.qkv, layer.qkv_bias, self.ladder)
        q, k, v = qkv.view(len(qkv), -1, config.head_dim).split(heads, dim=1)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        k_cache, v_cache = cache.planes["k"][index], cache.planes["v"][index]
        store_kv(k_cache, k[:count], step.block_ids, step.offsets)
        store_kv(v_cache, v[:count], step.block_ids, step.offsets)
        out = torch.zeros_like(q)
        for segment in step.segments:
            out[segment.rows] = paged_attention(q[segment.rows], k_cache, v_cache, segment, config.head_dim**-0.5)
        return linear(out.flatten(1), layer.out, layer.out_bias, self.ladder)


def probe_weights(model: Llama) -> list[torch.Tensor]:
    """One weight of each shape, for measuring a RowLadder."""
    layer = model.layers[0]
    shapes = {w.shape: w for w in (layer.qkv, layer.out, layer.gate_up, layer.down, model.head)}
    return list(shapes.values())


def rope_tables(config: ModelConfig, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of each position's angles: two [max_context, head_dim / 2] float32."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float()
    frequencies = 1.0 / (config.rope_theta ** (half / config.head_dim))
    if config.rope_scaling is not None:
        frequencies = _scale_frequencies(frequencies, config.rope_scaling)
    angles = torch.arange(config.max_context).float()[:, None] * frequencies
    return angles.cos().to(device), angles.sin().to(device)


def _scale_frequencies(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Linear: all by the factor. Llama 3: long waves by the factor, short ones not, a ramp between."""
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    original = scaling.original_max_context
    wavelengths = 2 * math.pi / frequencies
    low_wave, high_wave = original / scaling.low_freq_factor, original / scaling.high_freq_factor
    smooth = (original / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    ramp = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    scaled = torch.where(wavelengths > low_wave, frequencies / scaling.factor, frequencies)
    between = (wavelengths <= low_wave) & (wavelengths >= high_wave)
    return torch.where(between, ramp, scaled)


def _layer(weights: Weights, index: int) -> LlamaLayer:
    prefix = f"model.layers.{index}."

    def take(name: str) -> torch.Tensor:
        return weights.pop(prefix + name + ".weight")

    def stack(*names: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Stacked weights and biases of projections that read the same input; frees the parts."""
        biases = [weights.pop(prefix + name + ".bias", None) for name in names]
        parts = [take(name) for name in names]
        stacked = torch.cat(parts) if len(parts) > 1 else parts[0]
        present = [bias for bias in biases if bias is not None]
        return stacked, torch.cat(present) if present else None

    qkv = stack("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    out, gate_up, down = stack("self_attn.o_proj"), stack("mlp.gate_proj", "mlp.up_proj"), stack("mlp.down_proj")
    return LlamaLayer(
        take("input_layernorm"), *qkv, *out, take("post_attention_layernorm"), *gate_up, *down
    )  # fmt: skip
