"""A decoder over Triton's kernels, by the interpreter or on a device: equal to transformers, for short prompts."""

from __future__ import annotations

import pytest
import torch

from tests.engine.test_families import FAMILIES
from tests.engine.tiny import LogitRecorder, hf_model, random_prompt, random_weights, request, run, tiny_engine
from tests.kernels.interpreted import ON_DEVICE

pytestmark = pytest.mark.skipif(ON_DEVICE, reason="the kernels were loaded for the device")
NAMES = ("llama", "qwen3 with biases and a window", "gemma3", "mixtral")


@pytest.mark.parametrize("invariant", [False, True], ids=["free", "invariant"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_those_of_transformers(name: str, invariant: bool) -> None:
    config = FAMILIES[name]
    weights = random_weights(config, seed=3)
    built = tiny_engine(
        config, weights, block_size=4, num_blocks=80, prefill_chunk=16, prefix_cache=False, shuffle_seed=1,
        kernels="triton", batch_invariant=invariant,
    )  # fmt: skip
    recorder = LogitRecorder(built.runner)
    asked = [request(str(length), random_prompt(config, length, length), max_tokens=3) for length in (1, 21)]
    tokens, oracle = run(built.engine, recorder, asked), hf_model(config, weights)
    for item in asked:
        ours = recorder.of(item.key)
        with torch.inference_mode():
            theirs = oracle(torch.tensor([[*item.prompt_ids, *tokens[item.key]]])).logits[0, : len(ours)]
        assert len(ours) == len(item.prompt_ids) + 2
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
