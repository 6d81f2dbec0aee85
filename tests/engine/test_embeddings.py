"""Embeddings: the final hidden states of transformers' own models, pooled, however a prompt comes to be computed."""

from __future__ import annotations

from collections.abc import Sequence as Prompts
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from engine.build import BuiltEngine
from engine.engine import Engine, EngineSpec, ModelRunner
from engine.models.config import ModelConfig
from engine.scheduler import SchedulerLimits
from engine.types import LAST, MEAN, POOLINGS, Add, FinishReason, Request, SamplingParams, TokenOutput
from tests.engine.test_ranks import SplitRunner
from tests.engine.tiny import hf_model, random_prompt, random_weights, request, tiny_config, tiny_engine, turn

CONFIGS = {
    "llama": tiny_config(attention_bias=True, mlp_bias=True),
    "qwen3": tiny_config(architecture="Qwen3ForCausalLM", qk_norm=True, head_dim=16, tie_embeddings=True),
}
LENGTHS = (1, 4, 17, 50, 90)
TOLERANCE = 1e-4
SEED = 3


def asked(name: str, prompt_ids: Prompts[int], embed: str) -> Request:
    return Request(name, tuple(prompt_ids), SamplingParams(max_tokens=1, embed=embed))


def prompts_of(config: ModelConfig) -> list[tuple[int, ...]]:
    return [random_prompt(config, length, seed) for seed, length in enumerate(LENGTHS)]


def drive(engine: Engine, runner: ModelRunner, requests: Prompts[Request]) -> dict[str, list[TokenOutput]]:
    outputs: dict[str, list[TokenOutput]] = {}
    for one in requests:
        engine.handle(Add(one))
    while parts := turn(engine, runner):
        for output in (*parts[0].tokens, *parts[1].tokens):
            outputs.setdefault(output.key.request_id, []).append(output)
    for output in engine.take_outputs().tokens:
        outputs.setdefault(output.key.request_id, []).append(output)
    return outputs


def embedded(output: TokenOutput) -> np.ndarray:
    assert (output.finish, output.token_ids, output.error) == (FinishReason.STOP, (), None)
    return np.frombuffer(output.embedding, "<f4")


def embeddings(engine: Engine, runner: ModelRunner, requests: Prompts[Request]) -> dict[str, np.ndarray]:
    outputs = drive(engine, runner, requests)
    assert engine.begin() is None
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    assert engine.stats().num_leaked_blocks == 0
    return {name: embedded(only) for name, (only,) in outputs.items()}


@pytest.fixture(scope="module", params=CONFIGS)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIGS[request.param]


@pytest.fixture(scope="module")
def expected(config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """By pooling and number of the prompt, from AutoModel's last_hidden_state."""
    folder: Path = tmp_path_factory.mktemp("saved")
    hf_model(config, random_weights(config, SEED)).save_pretrained(folder)
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    found: dict[str, np.ndarray] = {}
    for index, prompt in enumerate(prompts_of(config)):
        with torch.inference_mode():
            states = model(torch.tensor([prompt])).last_hidden_state[0]
        for embed, pooled in ((LAST, states[-1]), (MEAN, states.mean(0))):
            found[f"{embed}{index}"] = torch.nn.functional.normalize(pooled, dim=0).numpy()
    return found


def all_requests(config: ModelConfig) -> list[Request]:
    prompts = enumerate(prompts_of(config))
    return [asked(f"{embed}{index}", prompt, embed) for index, prompt in prompts for embed in POOLINGS]


def check(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        np.testing.assert_allclose(found[name], one, rtol=0, atol=TOLERANCE)
        assert np.linalg.norm(found[name]) == pytest.approx(1, abs=1e-6)


def built(config: ModelConfig, **limits: Any) -> BuiltEngine:
    defaults: dict[str, Any] = {"num_blocks": 300, "shuffle_seed": 1}
    return tiny_engine(config, random_weights(config, SEED), **(defaults | limits))


@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_embeddings_equal_those_of_transformers_in_chunks_and_beside_others(
    config: ModelConfig, expected: dict[str, np.ndarray], chunk: int
) -> None:
    engine = built(config, prefill_chunk=chunk, max_batch_tokens=max(40, chunk))
    plain = [request("plain", random_prompt(config, 30, 9), max_tokens=5)]
    outputs = drive(engine.engine, engine.runner, [*all_requests(config), *plain])
    assert sum(len(one.token_ids) for one in outputs.pop("plain")) == 5
    check({name: embedded(only) for name, (only,) in outputs.items()}, expected)


def test_the_prefix_cache_is_read_for_the_last_state_and_never_for_the_mean(
    config: ModelConfig, expected: dict[str, np.ndarray]
) -> None:
    engine = built(config)
    check(embeddings(engine.engine, engine.runner, all_requests(config)), expected)
    again = drive(engine.engine, engine.runner, all_requests(config))
    check({name: embedded(only) for name, (only,) in again.items()}, expected)
    for index, length in enumerate(LENGTHS):
        assert again[f"{LAST}{index}"][0].cached_tokens == min(length // 4 * 4, length - 1)
        assert again[f"{MEAN}{index}"][0].cached_tokens == 0


def test_a_prompt_that_is_preempted_half_way_is_pooled_anew(
    config: ModelConfig, expected: dict[str, np.ndarray]
) -> None:
    engine = built(config, prefill_chunk=7)
    engine.engine.handle(Add(asked(f"{MEAN}4", prompts_of(config)[4], MEAN)))
    turn(engine.engine, engine.runner)
    turn(engine.engine, engine.runner)
    (sequence,) = engine.engine.scheduler.running
    assert 0 < sequence.computed < len(sequence.tokens)
    engine.engine.scheduler._preempt(sequence)
    found = embeddings(engine.engine, engine.runner, [])
    np.testing.assert_allclose(found[f"{MEAN}4"], expected[f"{MEAN}4"], rtol=0, atol=TOLERANCE)


def test_ranks_give_the_same_embeddings(config: ModelConfig, expected: dict[str, np.ndarray]) -> None:
    split = SplitRunner(config, random_weights(config, SEED), 2, num_blocks=300, block_size=4)
    limits = SchedulerLimits(4, 40, 64, 16, groups=split.layout.groups)
    engine = Engine(EngineSpec(limits, 300, config.max_context, config.vocab_size, frozenset(), b"tiny"))
    check(embeddings(engine, split, all_requests(config)), expected)


def test_what_is_no_embedding_is_refused() -> None:
    config = CONFIGS["llama"]
    engine = built(config).engine
    one = asked("one", (5, 6), LAST)
    wrong = asked("wrong", (5, 6), "cls")
    for command in (Add(one, handoff=True), Add(one, siblings=(one,)), Add(wrong)):
        engine.handle(command)
    errors = [output.error for output in engine.take_outputs().tokens]
    assert len(errors) == 4 and all(error and error.code == "invalid_request" for error in errors)
    assert engine.begin() is None
