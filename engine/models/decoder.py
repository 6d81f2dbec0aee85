"""One decoder for the Llama, Mistral, Qwen2, Qwen3, Gemma 3, Mixtral and Qwen3-MoE families.

RMSNorm, rotary grouped-query attention, gated feed-forward parts, dense or of experts. What differs between families is
a field of ModelConfig; none is asked for its name here. Weights come under the names that `weights` gives them.
"""

from __future__ import annotations

from collections.abc import Sequence as Groups
from collections.abc import Sequence as Names
from dataclasses import dataclass

import torch

from engine.batch import StepInput
from engine.kv_cache import KVCache
from engine.layer_groups import LayersStored
from engine.models.config import ModelConfig
from engine.models.moe import Experts, Mlp, OneByOne
from engine.models.rope import rope_tables
from engine.planes import CacheLayout, Group
from engine.ranks import ONE_RANK, Ranks
from kernels.backend import Backend, DenseLayer, Gate, GroupPlace, Heads, Linear, Mixture, Norms, Routing, Stack
from kernels.reference.quantized import Bits

Weights = dict[str, torch.Tensor]
_GATE_UP, _DOWN = ("gate_proj", "up_proj"), ("down_proj",)


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer. Projections that read the same input are stacked."""

    attention_norm: torch.Tensor
    qkv: Linear  # hidden -> (num_heads + 2 * num_kv_heads) * head_dim
    q_norm: torch.Tensor | None  # [head_dim]
    k_norm: torch.Tensor | None
    out: Linear  # num_heads * head_dim -> hidden
    attention_out_norm: torch.Tensor | None
    mlp_norm: torch.Tensor
    mlp: Mlp | Experts
    mlp_out_norm: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Results:
    """Of a step, float32. logits: [num_samples, vocab]; states: [num_states, hidden], after the final norm, on every
    rank."""

    logits: torch.Tensor
    states: torch.Tensor


class Decoder:
    """forward: a step's tokens -> what its sampled rows give. Writes the new KV, reads all of it from the cache."""

    def __init__(
        self, config: ModelConfig, weights: Weights, backend: Backend, ranks: Ranks = ONE_RANK, bits: Bits = 16
    ) -> None:  # fmt: skip
        """Takes the layers' tensors out of `weights`, so that those which are stacked or packed are freed. With several
        ranks, config and weights are this one's parts (engine/models/split.py). Linear layers keep so many bits of a
        weight; the head, to which words that differ little matter most, at least 8."""
        self.config = config
        self.ranks = ranks
        self.backend = backend
        self.norms = Norms(config.rms_norm_eps, config.wide_norms)
        self.heads = Heads(config.num_heads, config.num_kv_heads, config.head_dim, config.attention_scale)
        self.attention = backend.attention(self.heads, self.norms)
        self.embedding = weights["model.embed_tokens.weight"]  # [vocab, hidden]
        head = self.embedding if config.tie_embeddings else weights.pop("lm_head.weight")
        self.head = backend.linear(head, None, bits=bits if bits == 16 else 8)
        self.norm = backend.norm_weight(weights["model.norm.weight"])
        build = _LayerBuilder(config, weights, backend, bits)
        self.layers = [build.layer(index) for index in range(config.num_layers)]
        self.stack = self._stack()
        self.rope, self.local_rope = rope_tables(config, self.embedding.device)
        # rounded to the weights' type, as the model was trained with
        self._scale = torch.tensor(config.embedding_scale, dtype=self.embedding.dtype, device=self.embedding.device)

    def forward(self, step: StepInput, cache: KVCache, stored: LayersStored | None = None) -> Results:
        """A layer counts as stored when all ranks have added their part of its
        attention, since each stores its KV before."""
        hidden = self._embed(step.token_ids) * self._scale  # [padded_rows, hidden]
        groups = self._groups(step, cache.layout.groups)
        if self.stack is not None and self.stack.takes(hidden.shape[0]):
            k, v = cache.planes["k"], cache.planes["v"]
            hidden, added = self.stack(hidden, k, v, _in_order(cache.layout), groups, stored)
        else:
            hidden, added = self._run(hidden, groups, cache, stored)
        _, final = self.backend.add_norm(hidden, added, self.norm, self.norms)
        logits = self.head(final[step.sample_rows])[: step.num_samples].float()
        return Results(self.ranks.gather(logits, self.config.vocab_size), final[step.state_rows].float())

    def _run(
        self, hidden: torch.Tensor, groups: Groups[GroupPlace], cache: KVCache, stored: LayersStored | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Layer by layer, part by part: hidden, and what is yet to be added to it."""
        add_norm, norms, added = self.backend.add_norm, self.norms, None
        places = _in_order(cache.layout)
        for number, (layer, (group, slot)) in enumerate(zip(self.layers, places, strict=True), start=1):
            hidden, x = add_norm(hidden, added, layer.attention_norm, norms)
            k_cache, v_cache = cache.planes["k"][slot], cache.planes["v"][slot]
            qkv = layer.qkv(x)
            attended = self.attention.attend(qkv, layer.q_norm, layer.k_norm, k_cache, v_cache, groups[group])
            attended = self.ranks.add(layer.out(attended))
            if stored is not None:
                stored(number)
            hidden, x = add_norm(hidden, self._normed(attended, layer.attention_out_norm), layer.mlp_norm, norms)
            fed = self.ranks.add(layer.mlp(x))
            added = self._normed(fed, layer.mlp_out_norm)
        return hidden, added

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Each rank knows some of the vocabulary; to the others' tokens it adds zeros."""
        share = self.ranks.share
        if share.size == 1:
            return self.embedding[token_ids]
        mine = share.cut(self.config.vocab_size)
        is_mine = (token_ids >= mine.start) & (token_ids < mine.stop)
        found = self.embedding[torch.where(is_mine, token_ids - mine.start, 0)]
        return self.ranks.add(torch.where(is_mine[:, None], found, 0))

    def _groups(self, step: StepInput, groups: Groups[Group]) -> list[GroupPlace]:
        """Layers of one group share a window, and with it their rotary table."""
        whole, local = (
            self.attention.turns(table.cos, table.sin, step.positions) for table in (self.rope, self.local_rope)
        )
        return [
            GroupPlace(one.block_ids, step.offsets, whole if group.window is None else local, one.plan)
            for one, group in zip(step.groups, groups, strict=True)
        ]

    def _stack(self) -> Stack | None:
        """Ranks add up between the parts of a layer, and experts are picked there."""
        dense = [_dense(layer, layer.mlp) for layer in self.layers if isinstance(layer.mlp, Mlp)]
        if self.ranks.share.size > 1 or len(dense) < len(self.layers):
            return None
        return self.backend.stack(dense, self.heads, self.norms)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """x itself where the family has no such norm."""
        return x if weight is None else self.backend.norm(x, weight, self.norms)


def _in_order(layout: CacheLayout) -> list[tuple[int, int]]:
    """Group and slot of each layer."""
    places = layout.places()
    return [places[layer] for layer in range(len(places))]


def _dense(layer: Layer, mlp: Mlp) -> DenseLayer:
    return DenseLayer(
        layer.attention_norm, layer.qkv, layer.q_norm, layer.k_norm, layer.out, layer.attention_out_norm,
        layer.mlp_norm, mlp.gate_up, mlp.down, layer.mlp_out_norm,
    )  # fmt: skip


class _LayerBuilder:
    """Takes the parts of layers out of `weights`."""

    def __init__(self, config: ModelConfig, weights: Weights, backend: Backend, bits: Bits) -> None:
        self._config = config
        self._weights = weights
        self._backend = backend
        self._bits: Bits = bits
        self._gate: Gate = "silu" if config.activation == "silu" else "gelu_tanh"

    def layer(self, index: int) -> Layer:
        config, prefix = self._config, f"model.layers.{index}."
        qkv = self._linear(prefix, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
        out = self._linear(prefix, ("self_attn.o_proj",))
        sandwich, after = config.sandwich_norms, self._norm(f"{prefix}post_attention_layernorm")
        return Layer(
            attention_norm=self._norm(f"{prefix}input_layernorm"),
            qkv=qkv,
            q_norm=self._norm(f"{prefix}self_attn.q_norm") if config.qk_norm else None,
            k_norm=self._norm(f"{prefix}self_attn.k_norm") if config.qk_norm else None,
            out=out,
            # Llama's post_attention_layernorm comes before the feed-forward part, Gemma's before the addition
            attention_out_norm=after if sandwich else None,
            mlp_norm=self._norm(f"{prefix}pre_feedforward_layernorm") if sandwich else after,
            mlp=self._experts(prefix) if config.has_experts(index) else self._mlp(f"{prefix}mlp."),
            mlp_out_norm=self._norm(f"{prefix}post_feedforward_layernorm") if sandwich else None,
        )

    def _experts(self, prefix: str) -> Experts:
        assert self._config.moe is not None
        moe = self._config.moe
        routing = Routing(moe.num_experts, moe.experts_per_token, moe.normalize)
        return Experts(self._linear(prefix, ("mlp.gate",), bits=16), self._mixture(f"{prefix}mlp.experts.", routing))

    def _mixture(self, prefix: str, routing: Routing) -> Mixture:
        """A backend that stacks weights takes them one by one, and they are dropped: no layer's stay there twice."""
        prefixes = [f"{prefix}{index}." for index in range(routing.num_experts)]
        gate_ups = (self._stacked(one, _GATE_UP) for one in prefixes)
        downs = (self._stacked(one, _DOWN) for one in prefixes)
        mixture = self._backend.mixture(gate_ups, downs, self._gate, routing, self._bits)
        return mixture or OneByOne(tuple(map(self._mlp, prefixes)), routing, self._backend)

    def _mlp(self, prefix: str) -> Mlp:
        return Mlp(self._linear(prefix, _GATE_UP, self._gate), self._linear(prefix, _DOWN))

    def _linear(
        self, prefix: str, names: Names[str], gate: Gate | None = None, bits: Bits | None = None
    ) -> Linear:  # fmt: skip
        """Of stacked projections that read the same input."""
        weight = self._stacked(prefix, names)
        biases = [bias for name in names if (bias := self._weights.pop(f"{prefix}{name}.bias", None)) is not None]
        return self._backend.linear(weight, torch.cat(biases) if biases else None, gate, bits or self._bits)

    def _stacked(self, prefix: str, names: Names[str]) -> torch.Tensor:
        parts = [self._take(f"{prefix}{name}.weight") for name in names]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _norm(self, name: str) -> torch.Tensor:
        return self._backend.norm_weight(self._take(f"{name}.weight"))

    def _take(self, name: str) -> torch.Tensor:
        return self._weights.pop(name)
