"""One decoder for the Llama, Mistral, Qwen2, Qwen3, Gemma 3, Mixtral and Qwen3-MoE families.

RMSNorm, rotary grouped-query attention, gated feed-forward parts, dense or of experts. What differs between families is
a field of ModelConfig; none is asked for its name here. Weights come under the names that `weights` gives them.
"""

from __future__ import annotations

from collections.abc import Sequence as Names
from dataclasses import dataclass

import torch

from engine.batch import GroupInput, StepInput
from engine.kv_cache import KVCache
from engine.layer_groups import LayersStored
from engine.models.config import ModelConfig
from engine.models.moe import Experts, Mlp, feed_forward
from engine.models.rope import rope_tables
from engine.ranks import ONE_RANK, Ranks
from kernels.dispatch import prepare, weigh_for
from kernels.reference.attention import Segment, paged_attention
from kernels.reference.ladder import Ladders, linear
from kernels.reference.layers import apply_rope, rms_norm, store_kv
from kernels.reference.matrix import Matrix

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer. Projections that read the same input are stacked: [out, in]."""

    attention_norm: torch.Tensor
    qkv: Matrix  # [(num_heads + 2 * num_kv_heads) * head_dim, hidden]
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None  # [head_dim]
    k_norm: torch.Tensor | None
    out: Matrix  # [hidden, num_heads * head_dim]
    out_bias: torch.Tensor | None
    attention_out_norm: torch.Tensor | None
    mlp_norm: torch.Tensor
    mlp: Mlp | Experts
    mlp_out_norm: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one layer reads and writes in this step. cos, sin: [padded_rows, 1, head_dim / 2]."""

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    group: GroupInput
    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True, slots=True)
class Results:
    """Of a step, float32. logits: [num_samples, vocab]; states: [num_states, hidden], after the final norm, on every
    rank."""

    logits: torch.Tensor
    states: torch.Tensor


class Decoder:
    """forward: a step's tokens -> what its sampled rows give. Writes the new KV, reads all of it from the cache."""

    def __init__(self, config: ModelConfig, weights: Weights, ladders: Ladders, ranks: Ranks = ONE_RANK) -> None:
        """Takes the layers' tensors out of `weights`, so that those which are stacked or packed are freed. With several
        ranks, config and weights are this one's parts (engine/models/split.py)."""
        self.config = config
        self.ranks = ranks
        self.ladders = ladders
        self.embedding = weights["model.embed_tokens.weight"]  # [vocab, hidden]
        self.head = prepare(self.embedding if config.tie_embeddings else weights.pop("lm_head.weight"))
        self.weigh = weigh_for(self.embedding.device, self.embedding.dtype)
        self.norm = weights["model.norm.weight"]
        self.layers = [_layer(config, weights, index) for index in range(config.num_layers)]
        self.rope, self.local_rope = rope_tables(config, self.embedding.device)
        # rounded to the weights' type, as the model was trained with
        self._scale = torch.tensor(config.embedding_scale, dtype=self.embedding.dtype, device=self.embedding.device)

    def forward(self, step: StepInput, cache: KVCache, stored: LayersStored | None = None) -> Results:
        """A layer counts as stored when all ranks have added their part of its
        attention, since each stores its KV before."""
        hidden = self._embed(step.token_ids) * self._scale  # [padded_rows, hidden]
        for number, (layer, place) in enumerate(zip(self.layers, self._places(step, cache), strict=True), start=1):
            attended = self.ranks.add(self._attend(layer, self._normed(hidden, layer.attention_norm), place, step))
            if stored is not None:
                stored(number)
            hidden = hidden + self._normed(attended, layer.attention_out_norm)
            fed = feed_forward(self._normed(hidden, layer.mlp_norm), layer.mlp, self.config, self.ladders.linear)
            hidden = hidden + self._normed(self.ranks.add(fed), layer.mlp_out_norm)
        rows = self._normed(hidden[step.sample_rows], self.norm)
        logits = linear(rows, self.head, None, self.ladders.linear)[: step.num_samples].float()
        states = self._normed(hidden[step.state_rows], self.norm).float()
        return Results(self.ranks.gather(logits, self.config.vocab_size), states)

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Each rank knows some of the vocabulary; to the others' tokens it adds zeros."""
        share = self.ranks.share
        if share.size == 1:
            return self.embedding[token_ids]
        mine = share.cut(self.config.vocab_size)
        is_mine = (token_ids >= mine.start) & (token_ids < mine.stop)
        found = self.embedding[torch.where(is_mine, token_ids - mine.start, 0)]
        return self.ranks.add(torch.where(is_mine[:, None], found, 0))

    def _places(self, step: StepInput, cache: KVCache) -> list[_Place]:
        whole, local = self.rope.at(step.positions), self.local_rope.at(step.positions)
        places = cache.layout.places()
        found = []
        for layer in range(self.config.num_layers):
            group, slot = places[layer]
            cos, sin = whole if self.config.window_of(layer) is None else local
            found.append(_Place(cache.planes["k"][slot], cache.planes["v"][slot], step.groups[group], cos, sin))
        return found

    def _attend(self, layer: Layer, x: torch.Tensor, place: _Place, step: StepInput) -> torch.Tensor:
        config, count, group = self.config, step.num_tokens, place.group
        qkv = linear(x, layer.qkv, layer.qkv_bias, self.ladders.linear).view(len(x), -1, config.head_dim)
        qk, v = qkv.split((config.num_heads + config.num_kv_heads, config.num_kv_heads), dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = qk.split((config.num_heads, config.num_kv_heads), dim=1)
            qk = torch.cat((self._normed(q, layer.q_norm), self._normed(k, layer.k_norm)), dim=1)
        q, k = apply_rope(qk, place.cos, place.sin).split((config.num_heads, config.num_kv_heads), dim=1)
        store_kv(place.k_cache, k[:count], group.block_ids, step.offsets)
        store_kv(place.v_cache, v[:count], group.block_ids, step.offsets)
        attended = [self._attend_to(q, segment, place) for segment in group.segments]
        padding = q.new_zeros(len(q) - count, *q.shape[1:])
        out = torch.cat((*attended, padding)) if len(attended) > 1 or len(padding) else attended[0]
        return linear(out.flatten(1), layer.out, layer.out_bias, self.ladders.linear)

    def _attend_to(self, q: torch.Tensor, segment: Segment, place: _Place) -> torch.Tensor:
        scale = self.config.attention_scale
        return paged_attention(q[segment.rows], place.k_cache, place.v_cache, segment, scale, self.weigh)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """x itself where the family has no such norm."""
        if weight is None:
            return x
        return rms_norm(x, weight, self.config.rms_norm_eps, wide=self.config.wide_norms)


def probe_weights(model: Decoder) -> list[Matrix]:
    """One weight of each shape, for measuring ladders."""
    shapes = {}
    for layer in model.layers:
        for weight in (layer.qkv, layer.out, *_mlp_weights(layer.mlp), model.head):
            shapes.setdefault(weight.shape, weight)
    return list(shapes.values())


def _mlp_weights(part: Mlp | Experts) -> tuple[Matrix, ...]:
    if isinstance(part, Mlp):
        return part.gate_up, part.down
    return part.router, part.experts[0].gate_up, part.experts[0].down


def _layer(config: ModelConfig, weights: Weights, index: int) -> Layer:
    prefix = f"model.layers.{index}."
    qkv, qkv_bias = _stack(weights, prefix, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
    out, out_bias = _stack(weights, prefix, ("self_attn.o_proj",))
    sandwich, after = config.sandwich_norms, weights.pop(f"{prefix}post_attention_layernorm.weight")
    return Layer(
        attention_norm=weights.pop(f"{prefix}input_layernorm.weight"),
        qkv=qkv,
        qkv_bias=qkv_bias,
        q_norm=weights.pop(f"{prefix}self_attn.q_norm.weight") if config.qk_norm else None,
        k_norm=weights.pop(f"{prefix}self_attn.k_norm.weight") if config.qk_norm else None,
        out=out,
        out_bias=out_bias,
        # Llama's post_attention_layernorm comes before the feed-forward part, Gemma's before the addition
        attention_out_norm=after if sandwich else None,
        mlp_norm=weights.pop(f"{prefix}pre_feedforward_layernorm.weight") if sandwich else after,
        mlp=_experts(config, weights, prefix) if config.has_experts(index) else _mlp(weights, f"{prefix}mlp."),
        mlp_out_norm=weights.pop(f"{prefix}post_feedforward_layernorm.weight") if sandwich else None,
    )


def _experts(config: ModelConfig, weights: Weights, prefix: str) -> Experts:
    assert config.moe is not None
    experts = tuple(_mlp(weights, f"{prefix}mlp.experts.{index}.") for index in range(config.moe.num_experts))
    return Experts(prepare(weights.pop(f"{prefix}mlp.gate.weight")), experts)


def _mlp(weights: Weights, prefix: str) -> Mlp:
    return Mlp(*_stack(weights, prefix, ("gate_proj", "up_proj")), *_stack(weights, prefix, ("down_proj",)))


def _stack(weights: Weights, prefix: str, names: Names[str]) -> tuple[Matrix, torch.Tensor | None]:
    """Stacked weights and biases of projections that read the same input; takes the parts out of `weights`."""
    parts = [weights.pop(f"{prefix}{name}.weight") for name in names]
    biases = [bias for name in names if (bias := weights.pop(f"{prefix}{name}.bias", None)) is not None]
    weight = prepare(torch.cat(parts) if len(parts) > 1 else parts[0])
    return weight, torch.cat(biases) if biases else None
