"""ModelConfig from a Hugging Face config.json.

Pure: mappings in, record out. Both generations of keys are read: `rope_theta` and `rope_scaling` at the top level, and
`rope_parameters`, which holds both. A field that is absent has the default of its family's class in transformers.
Whatever would change the arithmetic and is not supported is refused by name; it is never ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from engine.errors import ModelError
from engine.models.config import ModelConfig, MoeConfig, RopeScaling, checked, windows_or_none
from engine.models.fields import flag, integer, number, present, refused, token_ids

# What a family's class in transformers takes for an absent field (null is another thing), where it is not Llama's.
_DEFAULTS: dict[str, dict[str, object]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {
        "num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096,
    },
    "MixtralForCausalLM": {
        "num_key_value_heads": 8, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
        "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    "Qwen2ForCausalLM": {"num_key_value_heads": 32, "max_position_embeddings": 32_768, "sliding_window": 4096},
    "Qwen3ForCausalLM": {
        "num_key_value_heads": 32, "max_position_embeddings": 32_768, "sliding_window": 4096, "head_dim": 128,
    },
    "Qwen3MoeForCausalLM": {
        "num_key_value_heads": 4, "max_position_embeddings": 32_768, "sliding_window": 4096, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    "Gemma3ForCausalLM": {
        "num_key_value_heads": 4, "max_position_embeddings": 131_072, "sliding_window": 4096, "head_dim": 256,
        "tie_word_embeddings": True, "query_pre_attn_scalar": 256, "hidden_activation": "gelu_pytorch_tanh",
    },
}  # fmt: skip
HF_ARCHITECTURES = tuple(_DEFAULTS)
_GEMMA3 = "Gemma3ForCausalLM"
# Models without a head, as folders of embedding models may have them: their final states are all there is of use.
_HEADLESS = {name.replace("ForCausalLM", "Model"): name for name in HF_ARCHITECTURES if name != _GEMMA3}
_QWEN = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
_WITH_ATTENTION_BIAS = ("LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", _GEMMA3)
_LAYER_KINDS = ("full_attention", "sliding_attention")
_WITH_LAYER_TYPES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", _GEMMA3)
_GEMMA3_THETA, _GEMMA3_LOCAL_THETA = 1_000_000.0, 10_000.0  # transformers' Gemma3TextConfig.default_theta
_QWEN_MAX_WINDOW_LAYERS = 28


def config_from_hf(config: Mapping[str, object], generation: Mapping[str, object] | None = None) -> ModelConfig:
    """From config.json and, where there is one, generation_config.json, whose token ids come first.

    Raises ModelError that names the field which is missing, of the wrong type, or not supported."""
    architecture, has_head = _architecture(config)
    config = _DEFAULTS[architecture] | dict(config)
    _refuse_unsupported(architecture, config)
    hidden_size = integer(config, "hidden_size")
    num_heads = integer(config, "num_attention_heads")
    max_context = integer(config, "max_position_embeddings", 2048)
    rope, local_theta = _rotary(architecture, config)
    scaling = _rope_scaling(rope, config, max_context)
    return checked(
        ModelConfig(
            vocab_size=integer(config, "vocab_size"),
            hidden_size=hidden_size,
            num_layers=integer(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=integer(config, "num_key_value_heads", num_heads),
            head_dim=integer(config, "head_dim", hidden_size // max(num_heads, 1)),
            intermediate_size=integer(config, "intermediate_size"),
            rms_norm_eps=number(config, "rms_norm_eps", 1e-6),
            rope_theta=number(rope, "rope_theta", number(config, "rope_theta", 10_000.0)),
            rope_scaling=scaling,
            max_context=max_context if scaling is None else scaling.stretched_context(max_context),
            tie_embeddings=flag(config, "tie_word_embeddings") or not has_head,
            attention_bias=flag(config, "attention_bias"),
            mlp_bias=flag(config, "mlp_bias"),
            eos_token_ids=token_ids("eos_token_id", generation or {}, config),
            bos_token_id=next(iter(token_ids("bos_token_id", generation or {}, config)), None),
            architecture=architecture,
            qkv_bias=architecture == "Qwen2ForCausalLM",
            qk_norm=architecture in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM", _GEMMA3),
            layer_windows=_windows(architecture, config),
            moe=_experts(architecture, config),
            **(_gemma3(config, local_theta) if architecture == _GEMMA3 else {}),
        )
    )


def _architecture(config: Mapping[str, object]) -> tuple[str, bool]:
    """By the name that it has with a head, and whether it has one."""
    names = config.get("architectures")
    if isinstance(names, list) and len(names) == 1 and names[0] in _HEADLESS:
        return _HEADLESS[names[0]], False
    if isinstance(names, list) and len(names) == 1 and names[0] in HF_ARCHITECTURES:
        return str(names[0]), True
    raise refused("architectures", names, HF_ARCHITECTURES)


def _refuse_unsupported(architecture: str, config: Mapping[str, object]) -> None:
    key, wanted = ("hidden_activation", "gelu_pytorch_tanh") if architecture == _GEMMA3 else ("hidden_act", "silu")
    if config.get(key, wanted) != wanted:
        raise refused(key, config[key], (wanted,))
    for key in (
        "quantization_config",
        "rope_interleaved",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "use_bidirectional_attention",
    ):
        if config.get(key):
            raise refused(key, config[key], (None,))
    if config.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise refused("partial_rotary_factor", config["partial_rotary_factor"], (1.0,))
    for key, families in (("attention_bias", _WITH_ATTENTION_BIAS), ("mlp_bias", ("LlamaForCausalLM",))):
        if config.get(key) and architecture not in families:
            raise refused(key, config[key], (False,))


def _gemma3(config: Mapping[str, object], local_theta: float) -> dict[str, Any]:
    return {
        "local_rope_theta": local_theta,
        "activation": "gelu_tanh",
        "sandwich_norms": True,
        "wide_norms": True,
        "embedding_scale": math.sqrt(integer(config, "hidden_size")),
        "query_scalar": number(config, "query_pre_attn_scalar"),
    }


# --- windows --------------------------------------------------------------------------------------------------


def _windows(architecture: str, config: Mapping[str, object]) -> tuple[int | None, ...]:
    num_layers = integer(config, "num_hidden_layers")
    kinds = config.get("layer_types")
    if architecture == "LlamaForCausalLM" or (architecture in _QWEN and not flag(config, "use_sliding_window")):
        window = None
    else:
        window = None if config.get("sliding_window") is None else integer(config, "sliding_window")
    if kinds is None:
        kinds = _default_kinds(architecture, config, num_layers)
    elif architecture not in _WITH_LAYER_TYPES and kinds != ["full_attention"] * num_layers:
        raise refused("layer_types", kinds, (None,))
    if not isinstance(kinds, list) or len(kinds) != num_layers or not set(kinds) <= set(_LAYER_KINDS):
        raise ModelError(f"layer_types must name a kind of {_LAYER_KINDS} for each layer: {kinds}", param="layer_types")
    if architecture in _WITH_LAYER_TYPES and "sliding_attention" in kinds and window is None:
        raise ModelError("layer_types has sliding layers, but no sliding_window is in use", param="layer_types")
    return windows_or_none(tuple(window if kind == "sliding_attention" else None for kind in kinds))


def _default_kinds(architecture: str, config: Mapping[str, object], num_layers: int) -> list[str]:
    if architecture == _GEMMA3:
        pattern = integer(config, "sliding_window_pattern", integer(config, "_sliding_window_pattern", 6))
        return [_LAYER_KINDS[(layer + 1) % max(pattern, 1) != 0] for layer in range(num_layers)]
    if architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        num_full = integer(config, "max_window_layers", _QWEN_MAX_WINDOW_LAYERS)
        slides = flag(config, "use_sliding_window") and config.get("sliding_window") is not None
        return [_LAYER_KINDS[slides and layer >= num_full] for layer in range(num_layers)]
    return ["sliding_attention"] * num_layers


# --- rotary embeddings ----------------------------------------------------------------------------------------


def _rotary(architecture: str, config: Mapping[str, object]) -> tuple[Mapping[str, object], float]:
    """The rotary record of layers without a window, wherever this generation of config.json keeps it (empty for plain
    rotary embeddings), and the base of layers with one (Gemma 3 only)."""
    key = "rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling"
    rope = _mapping(config, key)
    if architecture != _GEMMA3:
        return rope, 0.0
    nested = key == "rope_parameters" and not set(rope).isdisjoint(_LAYER_KINDS)
    whole, local = (_mapping(rope, kind) for kind in _LAYER_KINDS) if nested else (rope, {})
    if local.get("rope_type", "default") != "default":
        raise refused("rope_parameters.sliding_attention.rope_type", local["rope_type"], ("default",))
    theta = number(whole, "rope_theta", number(config, "rope_theta", _GEMMA3_THETA))
    local_theta = number(local, "rope_theta", number(config, "rope_local_base_freq", _GEMMA3_LOCAL_THETA))
    return dict(whole) | {"rope_theta": theta}, local_theta


def _mapping(fields: Mapping[str, object], key: str) -> Mapping[str, object]:
    value = fields.get(key) or {}
    if not isinstance(value, Mapping):
        raise ModelError(f"{key} must be a mapping, not {value!r}", param=key)
    return value


def _rope_scaling(rope: Mapping[str, object], config: Mapping[str, object], max_context: int) -> RopeScaling | None:
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise refused("partial_rotary_factor", rope["partial_rotary_factor"], (1.0,))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", number(rope, "factor"))
    if kind == "dynamic":
        return RopeScaling("dynamic", number(rope, "factor"), original_max_context=max_context)
    if kind == "yarn":
        return _yarn(rope, config, max_context)
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            number(rope, "factor"),
            number(rope, "low_freq_factor"),
            number(rope, "high_freq_factor"),
            integer(rope, "original_max_position_embeddings"),
        )
    raise refused("rope_type", kind, ("default", "linear", "dynamic", "yarn", "llama3"))


def _yarn(rope: Mapping[str, object], config: Mapping[str, object], max_context: int) -> RopeScaling:
    fallback = integer(config, "original_max_position_embeddings", max_context)
    original = integer(rope, "original_max_position_embeddings", fallback)
    factor = number(rope, "factor", max_context / max(original, 1))
    return RopeScaling(
        "yarn",
        factor,
        original_max_context=original,
        beta_fast=number(rope, "beta_fast", 32.0),
        beta_slow=number(rope, "beta_slow", 1.0),
        attention_factor=_yarn_attention_factor(rope, factor),
        truncate=flag(rope, "truncate", True),
    )


def _yarn_attention_factor(rope: Mapping[str, object], factor: float) -> float:
    """As the file says, else YaRN's 0.1 ln(factor) + 1 (Peng et al., 2023, section 3.4), else the quotient of two such
    terms with coefficients, as DeepSeek writes it."""
    if rope.get("attention_factor") is not None:
        return number(rope, "attention_factor")
    mscale, mscale_all_dim = number(rope, "mscale", 0.0), number(rope, "mscale_all_dim", 0.0)
    if mscale and mscale_all_dim:
        return yarn_attention_factor(factor, mscale) / yarn_attention_factor(factor, mscale_all_dim)
    return yarn_attention_factor(factor)


def yarn_attention_factor(factor: float, coefficient: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * coefficient * math.log(factor) + 1.0


# --- experts --------------------------------------------------------------------------------------------------


def _experts(architecture: str, config: Mapping[str, object]) -> MoeConfig | None:
    num_layers = integer(config, "num_hidden_layers")
    if architecture == "MixtralForCausalLM":
        return MoeConfig(
            integer(config, "num_local_experts"),
            integer(config, "num_experts_per_tok"),
            integer(config, "intermediate_size"),
            normalize=True,
            layer_ids=tuple(range(num_layers)),
        )
    if architecture != "Qwen3MoeForCausalLM":
        return None
    dense = present(config, "mlp_only_layers", [])
    if not isinstance(dense, list):
        raise ModelError(f"mlp_only_layers must be a list, not {dense!r}", param="mlp_only_layers")
    step = max(integer(config, "decoder_sparse_step", 1), 1)
    num_experts = integer(config, "num_experts", integer(config, "num_local_experts", 128))
    layer_ids = tuple(i for i in range(num_layers) if i not in dense and (i + 1) % step == 0)
    if not num_experts or not layer_ids:
        return None
    return MoeConfig(
        num_experts,
        integer(config, "num_experts_per_tok"),
        integer(config, "moe_intermediate_size"),
        flag(config, "norm_topk_prob"),
        layer_ids,
    )
