"""ModelConfig: the shape of a Llama model, read from config.json or from GGUF metadata.

Pure: mappings in, record out. It knows no files and no tensors. Both generations of Hugging Face keys are read:
`rope_theta` and `rope_scaling` at the top level, and `rope_parameters`, which holds both. Whatever would change the
arithmetic and is not supported is refused by name; it is never ignored.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from engine.errors import ModelError

MetaValue: TypeAlias = "str | int | float | bool | list[MetaValue]"

HF_ARCHITECTURES = ("LlamaForCausalLM",)
GGUF_ARCHITECTURES = {"llama": "LlamaForCausalLM"}  # to the name that ModelConfig.architecture holds


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched: all by `factor` (linear), or the long waves only (llama3).

    llama3 divides a frequency by `factor` where its wavelength exceeds original_max_context / low_freq_factor, leaves
    it where the wavelength is below original_max_context / high_freq_factor, and blends between the two.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_context: int = 8192  # tokens


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and constants of one model. Sizes are elements, `max_context` is tokens."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_context: int
    tie_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    architecture: str

    @classmethod
    def from_hf(cls, config: Mapping[str, object], generation: Mapping[str, object] | None = None) -> ModelConfig:
        """From config.json and, where there is one, generation_config.json, whose token ids come first.

        Raises ModelError that names the field which is missing, of the wrong type, or not supported."""
        architecture = _hf_architecture(config)
        _refuse_unsupported_hf(config)
        hidden_size = _integer(config, "hidden_size")
        num_heads = _integer(config, "num_attention_heads")
        rope = _hf_rope(config)
        return _checked(
            cls(
                vocab_size=_integer(config, "vocab_size"),
                hidden_size=hidden_size,
                num_layers=_integer(config, "num_hidden_layers"),
                num_heads=num_heads,
                num_kv_heads=_integer(config, "num_key_value_heads", num_heads),
                head_dim=_integer(config, "head_dim", hidden_size // max(num_heads, 1)),
                intermediate_size=_integer(config, "intermediate_size"),
                rms_norm_eps=_number(config, "rms_norm_eps", 1e-6),
                rope_theta=_number(rope, "rope_theta", _number(config, "rope_theta", 10_000.0)),
                rope_scaling=_hf_rope_scaling(rope),
                max_context=_integer(config, "max_position_embeddings", 2048),
                tie_embeddings=_flag(config, "tie_word_embeddings"),
                attention_bias=_flag(config, "attention_bias"),
                mlp_bias=_flag(config, "mlp_bias"),
                eos_token_ids=_token_ids("eos_token_id", generation or {}, config),
                bos_token_id=next(iter(_token_ids("bos_token_id", generation or {}, config)), None),
                architecture=architecture,
            )
        )

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, MetaValue],
        tensor_names: Collection[str],
        rope_factors: Sequence[float] | None = None,
    ) -> ModelConfig:
        """From a GGUF file's metadata and tensor names; `rope_factors` [head_dim / 2] is its `rope_freqs.weight`.

        Raises ModelError that names the key which is missing, of the wrong type, or not supported."""
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in GGUF_ARCHITECTURES:
            raise _refused("general.architecture", architecture, tuple(GGUF_ARCHITECTURES))
        if metadata.get("llama.expert_count", 0):
            raise _refused("llama.expert_count", metadata["llama.expert_count"], (0,))
        hidden_size = _integer(metadata, "llama.embedding_length")
        num_heads = _integer(metadata, "llama.attention.head_count")
        head_dim = _integer(metadata, "llama.attention.key_length", hidden_size // max(num_heads, 1))
        for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
            if metadata.get(key, head_dim) != head_dim:
                raise _refused(key, metadata[key], (head_dim,))
        theta = _number(metadata, "llama.rope.freq_base", 10_000.0)
        return _checked(
            cls(
                vocab_size=_gguf_vocab_size(metadata),
                hidden_size=hidden_size,
                num_layers=_integer(metadata, "llama.block_count"),
                num_heads=num_heads,
                num_kv_heads=_integer(metadata, "llama.attention.head_count_kv", num_heads),
                head_dim=head_dim,
                intermediate_size=_integer(metadata, "llama.feed_forward_length"),
                rms_norm_eps=_number(metadata, "llama.attention.layer_norm_rms_epsilon", 1e-6),
                rope_theta=theta,
                rope_scaling=_gguf_rope_scaling(metadata, rope_factors, theta, head_dim),
                max_context=_integer(metadata, "llama.context_length"),
                tie_embeddings="output.weight" not in tensor_names,
                attention_bias="blk.0.attn_q.bias" in tensor_names,
                mlp_bias="blk.0.ffn_up.bias" in tensor_names,
                eos_token_ids=_gguf_eos(metadata),
                bos_token_id=next(iter(_token_ids("tokenizer.ggml.bos_token_id", metadata)), None),
                architecture=GGUF_ARCHITECTURES[architecture],
            )
        )


# --- config.json ----------------------------------------------------------------------------------------------


def _hf_architecture(config: Mapping[str, object]) -> str:
    names = config.get("architectures")
    if isinstance(names, list) and len(names) == 1 and names[0] in HF_ARCHITECTURES:
        return str(names[0])
    raise _refused("architectures", names, HF_ARCHITECTURES)


def _refuse_unsupported_hf(config: Mapping[str, object]) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise _refused("hidden_act", config["hidden_act"], ("silu",))
    for key in ("quantization_config", "rope_interleaved"):
        if config.get(key):
            raise _refused(key, config[key], (None,))


def _hf_rope(config: Mapping[str, object]) -> Mapping[str, object]:
    """The rotary record, wherever this generation of config.json keeps it; empty for plain rotary embeddings."""
    key = "rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling"
    rope = config.get(key) or {}
    if not isinstance(rope, Mapping):
        raise ModelError(f"{key} must be a mapping, not {rope!r}", param=key)
    return rope


def _hf_rope_scaling(rope: Mapping[str, object]) -> RopeScaling | None:
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refused("partial_rotary_factor", rope["partial_rotary_factor"], (1.0,))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", _number(rope, "factor"))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            _number(rope, "factor"),
            _number(rope, "low_freq_factor"),
            _number(rope, "high_freq_factor"),
            _integer(rope, "original_max_position_embeddings"),
        )
    raise _refused("rope_type", kind, ("default", "linear", "llama3"))


# --- GGUF metadata --------------------------------------------------------------------------------------------


def _gguf_vocab_size(metadata: Mapping[str, MetaValue]) -> int:
    tokens = metadata.get("tokenizer.ggml.tokens")
    return _integer(metadata, "llama.vocab_size", len(tokens) if isinstance(tokens, list) else None)


def _gguf_eos(metadata: Mapping[str, MetaValue]) -> tuple[int, ...]:
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    return tuple(dict.fromkeys(token for key in keys for token in _token_ids(key, metadata)))


def _gguf_rope_scaling(
    metadata: Mapping[str, MetaValue], factors: Sequence[float] | None, theta: float, head_dim: int
) -> RopeScaling | None:
    kind = metadata.get("llama.rope.scaling.type", "none")
    if factors is not None:
        return _llama3_from_factors(factors, theta, head_dim)
    if kind == "none":
        return None
    if kind == "linear":
        return RopeScaling("linear", _number(metadata, "llama.rope.scaling.factor"))
    raise _refused("llama.rope.scaling.type", kind, ("none", "linear"))


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


# --- fields ---------------------------------------------------------------------------------------------------


def _checked(config: ModelConfig) -> ModelConfig:
    """The same record, if its sizes can form a model."""
    for field in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_context"):
        if getattr(config, field) <= 0:
            raise ModelError(f"{field} must be positive, not {getattr(config, field)}", param=field)
    if config.num_heads % config.num_kv_heads:
        raise ModelError(
            f"num_heads ({config.num_heads}) is no multiple of num_kv_heads ({config.num_kv_heads})",
            param="num_kv_heads",
        )
    if config.head_dim % 2:
        raise ModelError(f"head_dim must be even for rotary embeddings, not {config.head_dim}", param="head_dim")
    return config


def _integer(fields: Mapping[str, object], key: str, default: int | None = None) -> int:
    value = _present(fields, key, default)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ModelError(f"{key} must be an integer, not {value!r}", param=key)


def _number(fields: Mapping[str, object], key: str, default: float | None = None) -> float:
    value = _present(fields, key, default)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    raise ModelError(f"{key} must be a number, not {value!r}", param=key)


def _flag(fields: Mapping[str, object], key: str) -> bool:
    value = _present(fields, key, False)
    if isinstance(value, bool):
        return value
    raise ModelError(f"{key} must be true or false, not {value!r}", param=key)


def _present(fields: Mapping[str, object], key: str, default: object) -> object:
    """The field's value, or the default where it is absent or null."""
    value = fields.get(key)
    if value is None:
        value = default
    if value is None:
        raise ModelError(f"the model's configuration has no {key}", param=key)
    return value


def _token_ids(key: str, *sources: Mapping[str, object]) -> tuple[int, ...]:
    """Every id under `key`, one or a list, in the order of the sources and without repeats."""
    found: dict[int, None] = {}
    for source in sources:
        value = source.get(key)
        for item in value if isinstance(value, list) else [] if value is None else [value]:
            if not isinstance(item, int) or isinstance(item, bool):
                raise ModelError(f"{key} must hold token ids, not {item!r}", param=key)
            found[item] = None
    return tuple(found)


def _refused(field: str, value: object, supported: Sequence[object]) -> ModelError:
    names = ", ".join(map(repr, supported))
    return ModelError(f"{field} is {value!r}, which is not supported (supported: {names})", param=field)
