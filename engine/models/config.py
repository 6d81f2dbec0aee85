"""ModelConfig: the shape of a decoder-only model, whichever family and file format it comes from.

`config_hf` reads it from config.json, `config_gguf` from GGUF metadata. It knows no files and no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from engine.errors import ModelError

MetaValue: TypeAlias = "str | int | float | bool | list[MetaValue]"


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts beyond `original_max_context`; the formulas are in `rope`.

    linear: all by `factor`. llama3: long waves only, with a blend between two wavelengths.
    dynamic: the base grows with a token's position (NTK). yarn: long waves by `factor`, with a ramp between the
    dimensions that turn beta_fast and beta_slow times; cosines and sines are multiplied by `attention_factor`.
    """

    kind: Literal["linear", "llama3", "dynamic", "yarn"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_context: int = 8192  # tokens
    beta_fast: float = 32.0  # turns within the original context
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True  # are the ramp's ends whole dimensions?

    def stretched_context(self, max_context: int) -> int:
        """Tokens that a model can take whose file says `max_context`: dynamic and yarn files may name the original
        length only."""
        if self.kind in ("dynamic", "yarn"):
            return max(max_context, int(self.original_max_context * self.factor))
        return max_context


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """Layers whose feed-forward part is made of experts, of which each token takes `experts_per_token`."""

    num_experts: int
    experts_per_token: int
    intermediate_size: int  # of one expert
    normalize: bool  # do the weights of a token's experts add up to one?
    layer_ids: tuple[int, ...]


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
    attention_bias: bool  # of q, k, v and o
    mlp_bias: bool
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    architecture: str  # as config.json names it, e.g. LlamaForCausalLM
    qkv_bias: bool = False  # of q, k and v only
    qk_norm: bool = False  # each head's q and k pass a norm before the rotation
    layer_windows: tuple[int | None, ...] = ()  # positions a query sees, its own included; empty: no layer has a window
    local_rope_theta: float | None = None  # of layers with a window, whose frequencies are never stretched
    activation: Literal["silu", "gelu_tanh"] = "silu"
    sandwich_norms: bool = False  # the attention's and the feed-forward's results pass a norm, too
    wide_norms: bool = False  # norms multiply by their weight in float32, before rounding
    embedding_scale: float = 1.0
    query_scalar: float | None = None  # scores are divided by its root; None: head_dim
    moe: MoeConfig | None = None

    @property
    def attention_scale(self) -> float:
        """What attention scores are multiplied with."""
        return (self.head_dim if self.query_scalar is None else self.query_scalar) ** -0.5

    def window_of(self, layer: int) -> int | None:
        return self.layer_windows[layer] if self.layer_windows else None

    def has_experts(self, layer: int) -> bool:
        return self.moe is not None and layer in self.moe.layer_ids


def checked(config: ModelConfig) -> ModelConfig:
    """The same record, if its sizes can form a model. Raises ModelError that names the field."""
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
    if any(window is not None and window <= 0 for window in config.layer_windows):
        raise ModelError("sliding_window must be positive", param="sliding_window")
    _check_scaling(config)
    if config.moe is not None and not 0 < config.moe.experts_per_token <= config.moe.num_experts:
        raise ModelError(
            f"num_experts_per_tok is {config.moe.experts_per_token}, of {config.moe.num_experts} experts",
            param="num_experts_per_tok",
        )
    return config


def _check_scaling(config: ModelConfig) -> None:
    scaling = config.rope_scaling
    if scaling is None:
        return
    if scaling.factor <= 0 or scaling.original_max_context <= 0:
        raise ModelError(f"rotary scaling must have a positive factor and length, not {scaling}", param="factor")
    if scaling.kind == "dynamic" and config.head_dim <= 2:
        raise ModelError(f"dynamic scaling needs a head_dim above 2, not {config.head_dim}", param="head_dim")


def windows_or_none(windows: tuple[int | None, ...]) -> tuple[int | None, ...]:
    """As ModelConfig.layer_windows holds them: empty where no layer has one."""
    return () if all(window is None for window in windows) else windows
