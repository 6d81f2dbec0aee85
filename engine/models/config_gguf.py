"""ModelConfig from a GGUF file's metadata and tensor names.

Pure: mappings in, record out. Keys are those of the GGUF specification, `{arch}.` before most. What would change the
arithmetic and is not supported is refused by name; it is never ignored.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from engine.errors import ModelError
from engine.models.config import MetaValue, ModelConfig, MoeConfig, RopeScaling, checked, windows_or_none
from engine.models.config_hf import yarn_attention_factor
from engine.models.fields import flag, integer, number, refused, token_ids

# To the name that ModelConfig.architecture holds. llama.cpp calls Mistral and Mixtral llama, too.
GGUF_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
_NEUTRAL: dict[str, tuple[object, ...]] = {  # keys that change the arithmetic, and the values which do not
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.causal": (True,),
    "expert_shared_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "expert_gating_func": (0, 1),  # 1: softmax
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}
_GEMMA3_PATTERN = 6  # the last of six layers has no window
_GEMMA3_27B_LAYERS = 62  # the one Gemma 3 whose queries are scaled by hidden_size / num_heads; the file does not say


class _Keys:
    """Metadata of one architecture, read without its prefix."""

    def __init__(self, metadata: Mapping[str, MetaValue], architecture: str) -> None:
        self.metadata = metadata
        self.prefix = f"{architecture}."

    def get(self, key: str) -> MetaValue | None:
        return self.metadata.get(self.prefix + key)

    def integer(self, key: str, default: int | None = None) -> int:
        return integer(self.metadata, self.prefix + key, default)

    def number(self, key: str, default: float | None = None) -> float:
        return number(self.metadata, self.prefix + key, default)

    def flag(self, key: str, default: bool) -> bool:
        return flag(self.metadata, self.prefix + key, default)

    def refused(self, key: str, supported: Sequence[object]) -> ModelError:
        return refused(self.prefix + key, self.get(key), supported)


def config_from_gguf(
    metadata: Mapping[str, MetaValue], tensor_names: Collection[str], rope_factors: Sequence[float] | None = None
) -> ModelConfig:
    """`rope_factors` [head_dim / 2] is the file's `rope_freqs.weight`.

    Raises ModelError that names the key which is missing, of the wrong type, or not supported."""
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in GGUF_ARCHITECTURES:
        raise refused("general.architecture", architecture, tuple(GGUF_ARCHITECTURES))
    keys = _Keys(metadata, architecture)
    hidden_size = keys.integer("embedding_length")
    num_heads = keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length", hidden_size // max(num_heads, 1))
    _refuse_unsupported(keys, head_dim)
    theta = keys.number("rope.freq_base", 10_000.0)
    scaling = _rope_scaling(keys, rope_factors, theta, head_dim)
    max_context = keys.integer("context_length")
    moe = _experts(keys, tensor_names)
    out_bias = "blk.0.attn_output.bias" in tensor_names
    return checked(
        ModelConfig(
            vocab_size=_vocab_size(keys),
            hidden_size=hidden_size,
            num_layers=keys.integer("block_count"),
            num_heads=num_heads,
            num_kv_heads=keys.integer("attention.head_count_kv", num_heads),
            head_dim=head_dim,
            intermediate_size=keys.integer("feed_forward_length", None if moe is None else moe.intermediate_size),
            rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            max_context=max_context if scaling is None else scaling.stretched_context(max_context),
            tie_embeddings="output.weight" not in tensor_names,
            attention_bias=out_bias,
            mlp_bias="blk.0.ffn_up.bias" in tensor_names,
            eos_token_ids=_eos(metadata),
            bos_token_id=next(iter(token_ids("tokenizer.ggml.bos_token_id", metadata)), None),
            architecture=_architecture(architecture, moe),
            qkv_bias="blk.0.attn_q.bias" in tensor_names and not out_bias,
            qk_norm="blk.0.attn_q_norm.weight" in tensor_names,
            layer_windows=_windows(keys, architecture),
            moe=moe,
            **(_gemma3(keys) if architecture == "gemma3" else {}),
        )
    )


def _architecture(architecture: str, moe: MoeConfig | None) -> str:
    if architecture == "llama" and moe is not None:
        return "MixtralForCausalLM"
    return GGUF_ARCHITECTURES[architecture]


def _refuse_unsupported(keys: _Keys, head_dim: int) -> None:
    for key in ("rope.dimension_count", "attention.value_length"):
        if keys.get(key) not in (None, head_dim):
            raise keys.refused(key, (head_dim,))
    for key, neutral in _NEUTRAL.items():
        if keys.get(key) is not None and keys.get(key) not in neutral:
            raise keys.refused(key, neutral)


def _gemma3(keys: _Keys) -> dict[str, Any]:
    hidden_size, num_heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    is_27b = keys.integer("block_count") == _GEMMA3_27B_LAYERS
    scale = keys.number("attention.scale", 0.0)
    return {
        "local_rope_theta": keys.number("rope.freq_base_swa", 10_000.0),
        "activation": "gelu_tanh",
        "sandwich_norms": True,
        "wide_norms": True,
        "embedding_scale": math.sqrt(hidden_size),
        "query_scalar": scale**-2 if scale else hidden_size / num_heads if is_27b else None,
    }


def _windows(keys: _Keys, architecture: str) -> tuple[int | None, ...]:
    """Of llama (Mistral) every layer, of gemma3 five in six or as the file's pattern says."""
    num_layers, window = keys.integer("block_count"), keys.integer("attention.sliding_window", 0)
    if architecture == "gemma3":
        return windows_or_none(tuple(window if slides else None for slides in _gemma3_pattern(keys, num_layers)))
    if window and architecture != "llama":
        raise keys.refused("attention.sliding_window", (0,))
    return (window,) * num_layers if window else ()


def _gemma3_pattern(keys: _Keys, num_layers: int) -> list[bool]:
    pattern = keys.get("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        if len(pattern) != num_layers:
            raise keys.refused("attention.sliding_window_pattern", (f"{num_layers} flags",))
        return [bool(slides) for slides in pattern]
    every = max(keys.integer("attention.sliding_window_pattern", _GEMMA3_PATTERN), 1)
    return [(layer + 1) % every != 0 for layer in range(num_layers)]


def _experts(keys: _Keys, tensor_names: Collection[str]) -> MoeConfig | None:
    num_experts = keys.integer("expert_count", 0)
    if not num_experts:
        return None
    layers = range(keys.integer("block_count"))
    return MoeConfig(
        num_experts,
        keys.integer("expert_used_count"),
        keys.integer("expert_feed_forward_length", keys.integer("feed_forward_length", 0)),
        keys.flag("expert_weights_norm", True),
        tuple(layer for layer in layers if f"blk.{layer}.ffn_gate_inp.weight" in tensor_names),
    )


def _vocab_size(keys: _Keys) -> int:
    tokens = keys.metadata.get("tokenizer.ggml.tokens")
    return keys.integer("vocab_size", len(tokens) if isinstance(tokens, list) else None)


def _eos(metadata: Mapping[str, MetaValue]) -> tuple[int, ...]:
    names = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    return tuple(dict.fromkeys(token for name in names for token in token_ids(name, metadata)))


# --- rotary embeddings ----------------------------------------------------------------------------------------


def _rope_scaling(keys: _Keys, factors: Sequence[float] | None, theta: float, head_dim: int) -> RopeScaling | None:
    kind = keys.get("rope.scaling.type") or "none"
    if factors is not None:
        return _llama3_from_factors(factors, theta, head_dim)
    if kind == "none":
        return None
    if kind == "linear":
        return RopeScaling("linear", keys.number("rope.scaling.factor"))
    if kind == "yarn":
        factor = keys.number("rope.scaling.factor")
        return RopeScaling(
            "yarn",
            factor,
            original_max_context=keys.integer("rope.scaling.original_context_length", keys.integer("context_length")),
            beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0),
            attention_factor=yarn_attention_factor(factor),
        )
    raise keys.refused("rope.scaling.type", ("none", "linear", "yarn"))


def _llama3_from_factors(factors: Sequence[float], theta: float, head_dim: int) -> RopeScaling:
    """The llama3 record behind a file's divisors of the frequencies, [head_dim / 2].

    GGUF keeps only the divisors. Llama 3.1 to 3.3 differ in `factor` alone, which is the greatest divisor, so the
    record is guessed from it and accepted only if it gives back every divisor of the file."""
    scaling = RopeScaling("llama3", factor=max(factors, default=0.0))
    expected = [_llama3_divisor(scaling, theta ** (-2 * i / head_dim)) for i in range(head_dim // 2)]
    if len(factors) != len(expected) or not all(
        math.isclose(a, b, rel_tol=1e-4) for a, b in zip(factors, expected, strict=True)
    ):
        raise ModelError("rope_freqs.weight is no llama3 scaling that we know", param="rope_freqs.weight")
    return scaling


def _llama3_divisor(scaling: RopeScaling, frequency: float) -> float:
    """By what llama3 divides one rotary frequency (radians per token)."""
    turns = scaling.original_max_context * frequency / (2 * math.pi)  # of this wave, in the original context
    if turns < scaling.low_freq_factor:
        return scaling.factor
    if turns > scaling.high_freq_factor:
        return 1.0
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return 1 / ((1 - smooth) / scaling.factor + smooth)
