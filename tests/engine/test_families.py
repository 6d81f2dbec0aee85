"""Each family against transformers: saved by it, loaded by us, equal at every position however it is computed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.build import BuiltEngine
from engine.errors import ModelError
from engine.models.config import ModelConfig, MoeConfig, RopeScaling
from engine.models.config_hf import config_from_hf
from engine.models.decoder import Weights
from engine.models.loader import load_config
from engine.models.store import resolve
from engine.models.weights import load_weights
from engine.planes import attention_layout
from engine.types import Key
from kernels.dispatch import Kernels
from kernels.reference.layers import gelu_tanh_and_mul
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

WINDOW = 20
GEMMA3 = tiny_config(
    architecture="Gemma3ForCausalLM", num_layers=3, head_dim=16, qk_norm=True, layer_windows=(WINDOW, WINDOW, None),
    local_rope_theta=1000.0, rope_theta=50_000.0, activation="gelu_tanh", sandwich_norms=True, wide_norms=True,
    embedding_scale=32**0.5, query_scalar=24.0, tie_embeddings=True, rope_scaling=RopeScaling("linear", 8.0),
)  # fmt: skip
QWEN3_MOE = tiny_config(
    architecture="Qwen3MoeForCausalLM", num_layers=3, head_dim=16, qk_norm=True,
    moe=MoeConfig(6, 3, intermediate_size=20, normalize=True, layer_ids=(0, 2)),
)  # fmt: skip
MIXTRAL = tiny_config(architecture="MixtralForCausalLM", moe=MoeConfig(4, 2, 48, normalize=True, layer_ids=(0, 1)))
FAMILIES = {
    "llama": tiny_config(attention_bias=True, mlp_bias=True),
    "mistral": tiny_config(architecture="MistralForCausalLM", head_dim=16),
    "mistral with a window": tiny_config(architecture="MistralForCausalLM", layer_windows=(WINDOW, WINDOW)),
    "qwen2": tiny_config(architecture="Qwen2ForCausalLM", qkv_bias=True, tie_embeddings=True),
    "qwen2 with a window in some layers": tiny_config(
        architecture="Qwen2ForCausalLM", qkv_bias=True, layer_windows=(None, WINDOW)
    ),
    "qwen3": tiny_config(architecture="Qwen3ForCausalLM", qk_norm=True, head_dim=16),
    "qwen3 with biases and a window": tiny_config(
        architecture="Qwen3ForCausalLM", qk_norm=True, attention_bias=True, layer_windows=(WINDOW, None)
    ),
    "gemma3": GEMMA3,
    "mixtral": MIXTRAL,
    "qwen3 moe": QWEN3_MOE,
    "qwen3 moe, weights as they are": replace(QWEN3_MOE, moe=MoeConfig(5, 2, 20, normalize=False, layer_ids=(0, 1, 2))),
}
ROPES = {
    "linear": RopeScaling("linear", 2.5),
    "llama3": RopeScaling("llama3", 8.0, original_max_context=32),
    "yarn": RopeScaling("yarn", 4.0, original_max_context=128, attention_factor=1.2),
    "yarn, ramp not truncated": RopeScaling(
        "yarn", 4.0, original_max_context=128, beta_fast=8.0, beta_slow=2.0, truncate=False
    ),
    "dynamic within the original length": RopeScaling("dynamic", 2.0, original_max_context=256),
}
CASES = FAMILIES | {f"rope: {name}": tiny_config(head_dim=16, rope_scaling=rope) for name, rope in ROPES.items()}
LENGTHS = (1, 17, 50, 140)  # within the window and beyond it, past the first key tile
TOLERANCE = 1e-4


def engine_of(config: ModelConfig, weights: Weights, **limits: Any) -> BuiltEngine:
    """Roomy, with a block table for each group of layers."""
    windows = config.layer_windows
    groups = attention_layout(config.num_layers, config.num_kv_heads, config.head_dim, 4, "float32", windows).groups
    return tiny_engine(config, weights, num_blocks=600, prefix_cache=False, shuffle_seed=1, groups=groups, **limits)


class Saved:
    """A model in transformers' form, and in ours as read from what transformers saved."""

    def __init__(self, config: ModelConfig, folder: Path) -> None:
        self.model = hf_model(config, random_weights(config, seed=3))
        self.model.save_pretrained(folder)
        files = resolve(str(folder))
        self.config = load_config(files)
        self.weights: Weights = load_weights(files, self.config, torch.float32)

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        return self.model(torch.tensor([token_ids])).logits[0]

    def check(self, **limits: Any) -> None:
        built = engine_of(self.config, self.weights, **limits)
        recorder = LogitRecorder(built.runner)
        prompts = [random_prompt(self.config, length, seed) for seed, length in enumerate(LENGTHS)]
        asked = [request(str(index), prompt, max_tokens=6) for index, prompt in enumerate(prompts)]
        tokens = run(built.engine, recorder, asked)
        for item in asked:
            ours = recorder.of(item.key)
            assert len(ours) == len(item.prompt_ids) + 5
            theirs = self.logits([*item.prompt_ids, *tokens[item.key]])[: len(ours)]
            torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelConfig, Saved]:
    config = CASES[request.param]
    return config, Saved(config, tmp_path_factory.mktemp("saved"))


def test_the_saved_config_reads_as_the_shape_that_was_saved(case: tuple[ModelConfig, Saved]) -> None:
    config, saved = case
    assert replace(saved.config, query_scalar=None) == replace(config, query_scalar=None)
    assert saved.config.attention_scale == config.attention_scale


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_logits_equal_those_of_transformers_at_every_position(
    case: tuple[ModelConfig, Saved], chunk: int, kernels: Kernels
) -> None:
    case[1].check(prefill_chunk=chunk, kernels=kernels)


@pytest.mark.parametrize(("config", "old"), [
    (FAMILIES["qwen3"], {"rope_theta": 10_000.0}),
    (
        GEMMA3,
        {
            "rope_theta": 50_000.0, "rope_local_base_freq": 1000.0, "sliding_window_pattern": 3,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
], ids=["qwen3", "gemma3"])  # fmt: skip
def test_keys_of_before_transformers_5_mean_the_same(
    config: ModelConfig, old: dict[str, object], tmp_path: Path
) -> None:
    saved = Saved(config, tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    for key in ("rope_parameters", "layer_types"):
        fields.pop(key)
    path.write_text(json.dumps(fields | old))
    assert load_config(resolve(str(tmp_path))) == saved.config


def test_gated_gelu_equals_torch_s_and_has_the_same_bits_in_any_batch() -> None:
    x = torch.randn(40, 3000, generator=torch.Generator().manual_seed(0)) * 4
    x[0, :3] = torch.tensor([-1e4, 0.0, 1e4])
    together, (gate, up) = gelu_tanh_and_mul(x), x.chunk(2, dim=-1)
    torch.testing.assert_close(together, torch.nn.functional.gelu(gate, approximate="tanh") * up, rtol=1e-4, atol=2e-6)
    alone = torch.cat([gelu_tanh_and_mul(x[row : row + 1].clone()) for row in range(40)])
    assert torch.equal(alone, together)


@pytest.mark.parametrize("config", [GEMMA3, MIXTRAL, QWEN3_MOE], ids=lambda config: config.architecture)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_batch_and_a_chunk_size_change_no_bit(config: ModelConfig, dtype: torch.dtype) -> None:
    weights = random_weights(config, seed=5, dtype=dtype)
    prompts = [random_prompt(config, length, seed) for seed, length in enumerate((5, 60, 1, 131, 17))]
    asked = [request(str(index), prompt, max_tokens=4) for index, prompt in enumerate(prompts)]

    def compute(*indices: int, **limits: int) -> dict[Key, torch.Tensor]:
        built = engine_of(config, weights, **limits)
        recorder = LogitRecorder(built.runner)
        run(built.engine, recorder, [asked[index] for index in indices])
        return {asked[index].key: recorder.of(asked[index].key) for index in indices}

    together = compute(0, 1, 2, 3, 4, prefill_chunk=9, max_batch_tokens=40)
    for index in range(5):
        for key, logits in compute(index).items():
            assert torch.equal(logits, together[key]), f"{key}: {(logits - together[key]).abs().max()}"


@pytest.mark.parametrize(
    ("config", "change", "field"),
    [
        (GEMMA3, {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (GEMMA3, {"hidden_activation": "gelu"}, "hidden_activation"),
        (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA3, {"layer_types": ["sliding_attention"]}, "layer_types"),
        (FAMILIES["mistral"], {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        (FAMILIES["qwen2"], {"mlp_bias": True}, "mlp_bias"),
        (FAMILIES["qwen3"], {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (MIXTRAL, {"num_experts_per_tok": 9}, "num_experts_per_tok"),
    ],
)
def test_what_would_change_the_arithmetic_is_refused_by_name(
    config: ModelConfig, change: dict[str, object], field: str, tmp_path: Path
) -> None:
    hf_model(config, random_weights(config, seed=0)).config.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text()) | {"architectures": [config.architecture]} | change
    with pytest.raises(ModelError, match=field) as caught:
        config_from_hf(fields)
    assert caught.value.param == field


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_norms_that_are_loaded_in_float32_keep_their_digits_beside_bfloat16(kernels: Kernels) -> None:
    """As Gemma's are: the same numbers in the loader's type and in the model's give nearly one answer."""
    weights = random_weights(GEMMA3, seed=5, dtype=torch.bfloat16)
    wide = {name: weight.float() if "norm" in name else weight for name, weight in weights.items()}
    prompt, found = random_prompt(GEMMA3, 20, seed=1), list[torch.Tensor]()
    for own in (weights, wide):
        built = engine_of(GEMMA3, own, kernels=kernels)
        recorder = LogitRecorder(built.runner)
        run(built.engine, recorder, [request("one", prompt, max_tokens=2)])
        found.append(recorder.of(Key("one", 0)))
    assert (found[0] - found[1]).norm() < 0.01 * found[0].norm()
