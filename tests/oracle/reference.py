"""The oracle: what transformers' own models choose in float32, live, and as recorded in golden.json.

1. `Reference` is LlamaForCausalLM or Gemma3ForCausalLM with the weights that our loader read. That these equal another
   reading of the file is the business of tests/engine/test_models_weights.py and tests/oracle/test_gemma.py.
2. `greedy` prefills at once, then decodes token by token over transformers' KV cache, past any end-of-sequence.
3. `golden` reads what `python -m tests.oracle.record` wrote, by digest of the prompt's token ids; golden_gemma.json
   is written by `python -m tests.oracle.record gemma` and read by tests/oracle/test_gemma.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engine.models.config import ModelConfig
from engine.models.decoder import Weights
from engine.models.loader import load_config
from engine.models.weights import load_weights
from tests.oracle.compare import Expected
from tests.oracle.prompts import digest_of, model_files

if TYPE_CHECKING:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

GOLDEN_PATH = Path(__file__).with_name("golden.json")
NUM_NEW = 64
CLOSE_GAP = 1e-2  # gaps below it are recorded


class Reference:
    """transformers' model with these weights of ours, on the CPU."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        torch.set_num_threads(1)  # see tests/oracle/combinations.py
        self._model = load_model(config, weights)

    @torch.inference_mode()
    def greedy(self, prompt_ids: Sequence[int], count: int = NUM_NEW) -> Expected:
        """The next `count` tokens."""
        tokens: list[int] = []
        gaps: list[float] = []
        new, past = torch.tensor([list(prompt_ids)]), None
        for _ in range(count):
            out = self._model(new, past_key_values=past, use_cache=True, logits_to_keep=1)
            best = out.logits[0, -1].topk(2)
            tokens.append(int(best.indices[0]))
            gaps.append(float(best.values[0] - best.values[1]))
            new, past = torch.tensor([tokens[-1:]]), out.past_key_values
        close = {step: gap for step, gap in enumerate(gaps) if gap < CLOSE_GAP}
        return Expected(tuple(tokens), min(gaps), close)


def load_model(config: ModelConfig, weights: Weights) -> LlamaForCausalLM | Gemma3ForCausalLM:
    from transformers import Gemma3ForCausalLM, LlamaForCausalLM  # seconds to import

    if config.tie_embeddings:
        weights = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}
    if config.architecture == "Gemma3ForCausalLM":
        model = Gemma3ForCausalLM(_gemma_config(config)).eval()
        weights = {name: _their_norm(name, weight) for name, weight in weights.items()}
    else:
        model = LlamaForCausalLM(_llama_config(config)).eval()
    model.load_state_dict(weights)
    return model


def _llama_config(config: ModelConfig) -> LlamaConfig:
    from transformers import LlamaConfig

    assert config.rope_scaling is None, "not needed for the default model"
    return LlamaConfig(
        **_common_fields(config), attention_bias=config.attention_bias, mlp_bias=config.mlp_bias,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
    )  # fmt: skip


def _gemma_config(config: ModelConfig) -> Gemma3TextConfig:
    from transformers import Gemma3TextConfig

    assert config.rope_scaling is None, "not needed for the smallest model"
    return Gemma3TextConfig(
        **_common_fields(config), query_pre_attn_scalar=int(config.query_scalar or config.head_dim),
        sliding_window=next(window for window in config.layer_windows if window is not None),
        layer_types=["full_attention" if window is None else "sliding_attention" for window in config.layer_windows],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": config.rope_theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": config.local_rope_theta},
        },
    )  # fmt: skip


def _common_fields(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim, "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_context, "tie_word_embeddings": config.tie_embeddings,
    }  # fmt: skip


def _their_norm(name: str, weight: torch.Tensor) -> torch.Tensor:
    """transformers multiplies by 1 + weight, we by the weight, as GGUF files have it."""
    return weight - 1 if name.endswith("norm.weight") else weight


@cache
def load_reference() -> Reference:
    config = load_config(model_files())
    return Reference(config, load_weights(model_files(), config, torch.float32))


# --- golden.json ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Golden:
    """Recorded results and what made them."""

    numerics_version: int
    versions: dict[str, str]
    by_digest: dict[str, Expected]

    def expected(self, prompt_ids: Sequence[int]) -> Expected:
        """Raises KeyError for a prompt that was never recorded."""
        return self.by_digest[digest_of(prompt_ids)]


def golden() -> Golden:
    """Of the default model."""
    return read_golden(GOLDEN_PATH)


@cache
def read_golden(path: Path) -> Golden:
    record = json.loads(path.read_text("utf-8"))
    by_digest = {digest: _expected_from(one) for digest, one in record["prompts"].items()}
    return Golden(record["numerics_version"], record["versions"], by_digest)


def _expected_from(one: dict) -> Expected:
    gaps = {int(step): gap for step, gap in one["close_gaps"].items()}
    return Expected(tuple(one["tokens"]), one["min_gap"], gaps)
