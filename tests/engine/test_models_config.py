"""ModelConfig against transformers' own reading of the same files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.errors import ModelError
from engine.models.config import ModelConfig, RopeScaling
from engine.models.config_hf import config_from_hf
from engine.models.loader import load_config
from engine.models.store import resolve

BASE = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def assert_same_shape(ours: ModelConfig, theirs: Any) -> None:
    assert ours.vocab_size == theirs.vocab_size
    assert ours.hidden_size == theirs.hidden_size
    assert ours.num_layers == theirs.num_hidden_layers
    assert (ours.num_heads, ours.num_kv_heads) == (theirs.num_attention_heads, theirs.num_key_value_heads)
    assert ours.head_dim == theirs.head_dim
    assert ours.intermediate_size == theirs.intermediate_size
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.max_context == theirs.max_position_embeddings
    assert (ours.attention_bias, ours.mlp_bias) == (theirs.attention_bias, theirs.mlp_bias)
    assert ours.bos_token_id == theirs.bos_token_id
    eos = theirs.eos_token_id
    assert list(ours.eos_token_ids) == (eos if isinstance(eos, list) else [eos])


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True, "eos_token_id": [3, 5]},
        {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-4, "max_position_embeddings": 77},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 12345.0}},
    ],
)
def test_a_saved_config_reads_as_transformers_reads_it(tiny_llama, overrides):
    model, folder = tiny_llama(**overrides)
    ours = load_config(resolve(str(folder)))
    assert_same_shape(ours, AutoConfig.from_pretrained(folder))
    assert ours.tie_embeddings == model.config.tie_word_embeddings


def test_the_default_model_reads_as_transformers_reads_it(smollm2_files):
    theirs = AutoConfig.from_pretrained(smollm2_files.path.parent, gguf_file=smollm2_files.path.name)
    ours = load_config(smollm2_files)
    assert_same_shape(ours, theirs)
    assert ours.tie_embeddings
    assert ours.architecture == "LlamaForCausalLM"


def test_old_and_new_rope_keys_mean_the_same():
    old = config_from_hf(BASE | {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | LLAMA3})
    older = config_from_hf(BASE | {"rope_theta": 5e5, "rope_scaling": {"type": "llama3"} | LLAMA3})
    new = config_from_hf(BASE | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | LLAMA3})
    assert old == older == new
    assert new.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert new.rope_theta == 5e5


def test_linear_scaling_is_read():
    config = config_from_hf(BASE | {"rope_scaling": {"type": "linear", "factor": 4}})
    assert config.rope_scaling == RopeScaling("linear", 4.0)


def test_generation_config_adds_its_end_tokens_first():
    config = config_from_hf(BASE | {"eos_token_id": 2}, {"eos_token_id": [7, 2], "bos_token_id": 1})
    assert config.eos_token_ids == (7, 2)
    assert config.bos_token_id == 1


def test_null_fields_take_the_architecture_s_defaults():
    config = config_from_hf(BASE | {"num_key_value_heads": None, "head_dim": None, "rope_scaling": None})
    assert (config.num_kv_heads, config.head_dim, config.rope_scaling) == (4, 8, None)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "architectures"),
        ({"architectures": None}, "architectures"),
        ({"vocab_size": None}, "vocab_size"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"num_key_value_heads": 3}, "num_kv_heads"),
        ({"num_attention_heads": 0}, "num_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id"),
    ],
)
def test_a_config_that_cannot_be_served_names_its_field(change, field):
    with pytest.raises(ModelError, match=field) as caught:
        config_from_hf(BASE | change)
    assert caught.value.param == field


def test_a_broken_config_file_is_named(tiny_llama):
    _, folder = tiny_llama()
    files = resolve(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is no valid JSON"):
        load_config(files)
    (folder / "config.json").write_text(json.dumps(BASE | {"architectures": ["Other"]}))
    with pytest.raises(ModelError, match="tiny-llama: architectures is"):
        load_config(files)


# --- GGUF -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"architecture": "mamba"}, "general.architecture"),
        ({"llama.expert_count": 8}, "llama.expert_used_count"),
        ({"llama.final_logit_softcapping": 30.0}, "llama.final_logit_softcapping"),
        ({"llama.expert_shared_count": 1}, "llama.expert_shared_count"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count"),
        ({"llama.rope.scaling.type": "longrope"}, "llama.rope.scaling.type"),
        ({"llama.attention.head_count": "four"}, "llama.attention.head_count"),
    ],
)
def test_a_gguf_that_cannot_be_served_names_its_key(tiny_gguf, change, field):
    files = resolve(str(tiny_gguf(**change)))
    with pytest.raises(ModelError, match=field) as caught:
        load_config(files)
    assert caught.value.param == field
    assert str(files.path) in caught.value.message


def test_llama3_scaling_is_recognised_in_a_gguf_s_rope_factors(tiny_gguf):
    """llama.cpp stores divisors of the frequencies; transformers computes the frequencies that they must lead to."""
    theirs = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5} | LLAMA3 | {"factor": 32.0},
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    plain = np.array([5e5 ** (-2 * i / 16) for i in range(8)])
    path = tiny_gguf(extra={"rope_freqs.weight": (plain / scaled.numpy()).astype(np.float32)})
    scaling = load_config(resolve(str(path))).rope_scaling
    assert scaling is not None
    assert scaling.kind == "llama3"
    assert math.isclose(scaling.factor, 32.0, rel_tol=1e-5)


def test_unknown_rope_factors_are_refused(tiny_gguf):
    path = tiny_gguf(extra={"rope_freqs.weight": np.linspace(1, 9, 8, dtype=np.float32)})
    with pytest.raises(ModelError, match=r"rope_freqs\.weight"):
        load_config(resolve(str(path)))


def test_linear_scaling_of_a_gguf_is_read(tiny_gguf):
    path: Path = tiny_gguf(**{"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0})
    assert load_config(resolve(str(path))).rope_scaling == RopeScaling("linear", 2.0)
