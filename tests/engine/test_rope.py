"""Rotary frequencies against transformers' own, and dynamic NTK against its decoding token by token."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.models.config import RopeScaling
from engine.models.config_hf import config_from_hf
from engine.models.rope import frequencies, rope_tables
from tests.engine.tiny import (
    LogitRecorder,
    hf_model,
    random_prompt,
    random_weights,
    request,
    run,
    tiny_config,
    tiny_engine,
)

ORIGINAL = 32
CPU = torch.device("cpu")
BASE = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 96, "hidden_size": 64, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "dynamic", "factor": 3.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "attention_factor": 0.8},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "truncate": False},
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 4.0},
        {
            "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64, "mscale": 0.7,
            "mscale_all_dim": 1.1,
        },
        {"rope_type": "yarn", "factor": 2.0},
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=str,
)  # fmt: skip
def test_cosines_and_sines_equal_those_of_transformers(rope: dict[str, object]) -> None:
    parameters = {"rope_theta": 20_000.0} | rope
    theirs = LlamaConfig(**{**BASE, "rope_parameters": dict(parameters)})
    ours = config_from_hf(BASE | {"rope_parameters": parameters})
    positions = torch.arange(512)
    cos, sin = LlamaRotaryEmbedding(theirs)(torch.zeros(1, 1), positions[None])
    table, _ = rope_tables(ours, CPU)
    torch.testing.assert_close(table.cos[:512], cos[0, :, :16], rtol=0, atol=2e-4)
    torch.testing.assert_close(table.sin[:512], sin[0, :, :16], rtol=0, atol=2e-4)
    if rope["rope_type"] != "dynamic":
        wanted, factor = ROPE_INIT_FUNCTIONS[str(rope["rope_type"])](theirs, CPU)
        torch.testing.assert_close(frequencies(20_000.0, ours.rope_scaling, 32, 512), wanted, rtol=1e-6, atol=0)
        assert ours.rope_scaling is not None
        assert ours.rope_scaling.attention_factor == pytest.approx(factor)


def test_dynamic_frequencies_are_those_of_a_sequence_that_ends_at_the_position() -> None:
    theirs = LlamaConfig(**{**BASE, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}})
    scaling = RopeScaling("dynamic", 2.0, original_max_context=512)
    ours = frequencies(1e4, scaling, 32, 1024)
    for position in (0, 511, 512, 700, 1023):
        wanted, _ = ROPE_INIT_FUNCTIONS["dynamic"](theirs, CPU, seq_len=position + 1)
        torch.testing.assert_close(ours[position], wanted, rtol=1e-5, atol=0)


@torch.inference_mode()
def test_dynamic_logits_equal_those_of_transformers_decoding_token_by_token() -> None:
    scaling = RopeScaling("dynamic", 4.0, original_max_context=ORIGINAL)
    config = tiny_config(rope_scaling=scaling, max_context=4 * ORIGINAL, head_dim=16)
    weights = random_weights(config, seed=2)
    prompt = random_prompt(config, 80, seed=1)
    built = tiny_engine(config, weights, prefill_chunk=7, prefix_cache=False)
    recorder, asked = LogitRecorder(built.runner), request("a", prompt, max_tokens=1)
    run(built.engine, recorder, [asked])
    model, cache, rows = hf_model(config, weights), None, []
    for token in prompt:
        answer = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        cache = answer.past_key_values
        rows.append(answer.logits[0, -1])
    torch.testing.assert_close(recorder.of(asked.key), torch.stack(rows), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("rope", "length"),
    [({"rope_type": "dynamic", "factor": 4.0}, 2048),
     ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
     ({"rope_type": "linear", "factor": 4.0}, 512)],
)  # fmt: skip
def test_a_file_that_names_the_original_length_only_is_served_to_the_stretched_one(rope, length) -> None:
    assert config_from_hf(BASE | {"rope_scaling": rope}).max_context == length
