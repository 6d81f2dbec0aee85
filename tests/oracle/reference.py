"""The oracle: what transformers' own Llama chooses in float32, live, and as recorded in golden.json.

1. `Reference` is LlamaForCausalLM with the weights that our loader read. That these equal transformers' own reading
   of the file is tests/engine/test_models_weights.py's business.
2. `greedy` prefills at once, then decodes token by token over transformers' KV cache, past any end-of-sequence.
3. `golden` reads what `python -m tests.oracle.record` wrote, by digest of the prompt's token ids.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engine.models.config import ModelConfig
from engine.models.loader import load_config
from engine.models.store import ModelFiles
from engine.models.weights import load_weights
from tests.oracle.compare import Expected
from tests.oracle.prompts import digest_of, model_files

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM

GOLDEN_PATH = Path(__file__).with_name("golden.json")
NUM_NEW = 64
CLOSE_GAP = 1e-2  # gaps below it are recorded


class Reference:
    """transformers' Llama with the default model's weights, on the CPU."""

    def __init__(self) -> None:
        torch.set_num_threads(1)  # see tests/oracle/combinations.py
        self._model = load_model(model_files())

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


def load_model(files: ModelFiles) -> LlamaForCausalLM:
    """transformers' model with the weights of these files, in float32."""
    from transformers import LlamaForCausalLM  # seconds to import

    config = load_config(files)
    weights = load_weights(files, config, torch.float32)
    model = LlamaForCausalLM(_llama_config(config)).eval()
    if config.tie_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    return model


def _llama_config(config: ModelConfig) -> LlamaConfig:
    from transformers import LlamaConfig

    assert config.rope_scaling is None, "not needed for the default model"
    return LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim, rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_context, tie_word_embeddings=config.tie_embeddings,
        attention_bias=config.attention_bias, mlp_bias=config.mlp_bias,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
    )  # fmt: skip


@cache
def load_reference() -> Reference:
    return Reference()


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


@cache
def golden() -> Golden:
    record = json.loads(GOLDEN_PATH.read_text("utf-8"))
    by_digest = {digest: _expected_from(one) for digest, one in record["prompts"].items()}
    return Golden(record["numerics_version"], record["versions"], by_digest)


def _expected_from(one: dict) -> Expected:
    gaps = {int(step): gap for step, gap in one["close_gaps"].items()}
    return Expected(tuple(one["tokens"]), one["min_gap"], gaps)
