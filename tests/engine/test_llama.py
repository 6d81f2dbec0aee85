"""The Llama model: equal to transformers at every position, and independent of how a step was put together."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from engine.batch import plan_step
from engine.build import BuiltEngine
from engine.errors import ModelError
from engine.model_runner import build_model
from engine.models.config import ModelConfig, RopeScaling
from engine.models.decoder import Weights
from engine.types import Add, Key, Request
from kernels.dispatch import Kernels
from kernels.reference.quantized import Bits, quantize
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

LLAMA3 = RopeScaling("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_context=32)
CONFIGS = {
    "one head per KV head": tiny_config(num_kv_heads=4),
    "three heads per KV head, biases": tiny_config(
        hidden_size=48, num_heads=6, num_kv_heads=2, attention_bias=True, mlp_bias=True
    ),
    "four heads per KV head, tied, llama3": tiny_config(
        num_heads=8, num_kv_heads=2, head_dim=16, tie_embeddings=True, rope_scaling=LLAMA3
    ),
    "linear scaling, odd sizes": tiny_config(
        vocab_size=101, hidden_size=36, num_heads=3, num_kv_heads=1, head_dim=12, intermediate_size=50, num_layers=3,
        rope_theta=500.0, rope_scaling=RopeScaling("linear", 2.5),
    ),
}  # fmt: skip
LENGTHS = (1, 3, 16, 17, 37, 140)  # one token, on and beside block borders, and past the first key tile
TOLERANCE = 1e-4


KERNELS: tuple[Kernels, ...] = ("auto", "torch")


@pytest.fixture(scope="module", params=CONFIGS, ids=str)
def oracle(request: pytest.FixtureRequest) -> Oracle:
    return Oracle(CONFIGS[request.param])


class Oracle:
    """One model, in ours and in transformers' form, with prompts for it."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.weights = random_weights(config, seed=3)
        self.model = hf_model(config, self.weights)
        self.prompts = [random_prompt(config, length, seed) for seed, length in enumerate(LENGTHS)]

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        return self.model(torch.tensor([token_ids])).logits[0]

    def check(self, built: BuiltEngine, prompts: list[tuple[int, ...]]) -> None:
        """Generate after all prompts at once; each logit row equals the oracle's for the same tokens."""
        recorder = LogitRecorder(built.runner)
        asked = [request(str(index), prompt, max_tokens=6) for index, prompt in enumerate(prompts)]
        tokens = run(built.engine, recorder, asked)
        for item in asked:
            ours = recorder.of(item.key)
            theirs = self.logits([*item.prompt_ids, *tokens[item.key]])[: len(ours)]
            assert len(ours) == len(item.prompt_ids) + 5
            torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("chunk", "block_size"), [(256, 4), (1, 16), (7, 4), (7, 16)])
def test_logits_equal_those_of_transformers_at_every_position(
    oracle: Oracle, chunk: int, block_size: int, kernels: Kernels
) -> None:
    built = tiny_engine(
        oracle.config, oracle.weights, block_size=block_size, num_blocks=400 // block_size, prefill_chunk=chunk,
        prefix_cache=False, shuffle_seed=chunk, kernels=kernels,
    )  # fmt: skip
    oracle.check(built, oracle.prompts)


def test_logits_equal_those_of_transformers_without_batch_invariance(oracle: Oracle) -> None:
    built = tiny_engine(
        oracle.config, oracle.weights, num_blocks=100, prefix_cache=False, batch_invariant=False, shuffle_seed=5
    )
    oracle.check(built, oracle.prompts)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kernels", KERNELS)
def test_whole_numbers_give_the_logits_of_the_weights_that_they_keep(bits: Bits, kernels: Kernels) -> None:
    """transformers' model gets what a weight of so many bits stands for; bfloat16 is rounded elsewhere, too."""
    config = tiny_config(hidden_size=64, num_heads=4, head_dim=32, intermediate_size=96)
    weights = random_weights(config, seed=3, dtype=torch.bfloat16)
    kept = {name: _kept(name, weight, bits) for name, weight in weights.items()}
    assert (kept["lm_head.weight"] != weights["lm_head.weight"]).any()
    built = tiny_engine(config, weights, kernels=kernels, bits=bits, prefix_cache=False)
    recorder, prompt = LogitRecorder(built.runner), random_prompt(config, 40, seed=1)
    run(built.engine, recorder, [request("one", prompt, max_tokens=2)])
    with torch.inference_mode():
        wanted = hf_model(config, kept)(torch.tensor([prompt])).logits[0]
        plain = hf_model(config, {name: weight.float() for name, weight in weights.items()})(torch.tensor([prompt]))
    got = recorder.of(Key("one", 0))[: len(prompt)]
    error, change = (got - wanted).norm(), (plain.logits[0] - wanted).norm()
    assert error < 0.03 * wanted.norm()
    assert bits == 8 or error < 0.5 * change, "the weights are not these numbers"


def _kept(name: str, weight: torch.Tensor, bits: Bits) -> torch.Tensor:
    if "norm" in name or "embed" in name:
        return weight.float()
    quantized = quantize(weight, 8 if name == "lm_head.weight" else bits)
    assert quantized is not None
    return quantized.restored()


def test_a_chunk_longer_than_one_attention_call_equals_transformers() -> None:
    oracle = Oracle(CONFIGS["three heads per KV head, biases"])
    built = tiny_engine(oracle.config, oracle.weights, num_blocks=32, block_size=16, prefill_chunk=512, shuffle_seed=1)
    oracle.check(built, [random_prompt(oracle.config, 400, seed=9)])


# --- batch invariance, bit for bit ----------------------------------------------------------------------------

INVARIANT = {
    "grouped": tiny_config(num_heads=6, num_kv_heads=2, head_dim=16, hidden_size=96, attention_bias=True),
    "odd sizes": tiny_config(
        vocab_size=101, hidden_size=36, num_heads=3, num_kv_heads=1, head_dim=12, intermediate_size=50
    ),
}  # fmt: skip
BATCH_LENGTHS = (5, 60, 129, 2, 31, 1, 300, 17, 64, 65, 8, 127, 128, 3, 90, 200)


ROOMY: dict[str, Any] = {"num_blocks": 120, "block_size": 16}


class Invariance:
    """Sixteen requests of one model, and the logits of each alone, its prompt in one piece."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, kernels: Kernels) -> None:
        self.config = config
        self.kernels: Kernels = kernels
        self.weights: Weights = random_weights(config, seed=11, dtype=dtype)
        prompts = [random_prompt(config, length, seed) for seed, length in enumerate(BATCH_LENGTHS)]
        self.requests = [request(str(index), prompt, max_tokens=4) for index, prompt in enumerate(prompts)]
        self.alone: dict[Key, torch.Tensor] = {}
        for item in self.requests:
            self.alone |= self.compute([item], prefill_chunk=512, prefix_cache=False)

    def engine(self, **limits: Any) -> BuiltEngine:
        return tiny_engine(self.config, self.weights, kernels=self.kernels, **limits)

    def compute(self, requests: list[Request], **limits: Any) -> dict[Key, torch.Tensor]:
        built = self.engine(**(ROOMY | limits))
        recorder = LogitRecorder(built.runner)
        tokens = run(built.engine, recorder, requests)
        assert all(len(tokens[item.key]) == 4 for item in requests)
        return {item.key: recorder.of(item.key) for item in requests}

    def check(self, requests: list[Request], **limits) -> None:
        for key, logits in self.compute(requests, **limits).items():
            assert logits.isfinite().all()
            assert torch.equal(logits, self.alone[key]), f"{key}: {(logits - self.alone[key]).abs().max()}"


@pytest.fixture(scope="module", params=itertools.product(INVARIANT, ("float32", "bfloat16"), KERNELS), ids=str)
def invariance(request: pytest.FixtureRequest) -> Invariance:
    name, dtype, kernels = request.param
    return Invariance(INVARIANT[name], getattr(torch, dtype), kernels)


@pytest.mark.parametrize("num_seqs", [2, 3, 7, 16])
def test_a_batch_changes_no_bit(invariance: Invariance, num_seqs: int) -> None:
    invariance.check(invariance.requests[:num_seqs], prefix_cache=False)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_chunk_size_changes_no_bit(invariance: Invariance, chunk: int) -> None:
    invariance.check(invariance.requests, prefill_chunk=chunk, max_batch_tokens=96, prefix_cache=False)


@pytest.mark.parametrize("seed", [1, 2])
def test_the_placement_of_blocks_changes_no_bit(invariance: Invariance, seed: int) -> None:
    invariance.check(invariance.requests, shuffle_seed=seed, prefix_cache=False)


def test_the_block_size_changes_no_bit(invariance: Invariance) -> None:
    invariance.check(invariance.requests, block_size=4, num_blocks=450, prefill_chunk=48, max_batch_tokens=100)


def test_a_prefix_found_in_the_cache_changes_no_bit(invariance: Invariance) -> None:
    built = tiny_engine(
        invariance.config, invariance.weights, kernels=invariance.kernels, block_size=16, num_blocks=160, shuffle_seed=4
    )
    recorder = LogitRecorder(built.runner)
    run(built.engine, recorder, invariance.requests)
    again = [replace(item, epoch=1) for item in invariance.requests]
    run(built.engine, recorder, again)
    assert built.engine.stats().prefix_hits > 0.8 * sum(BATCH_LENGTHS)
    for item in again:
        found = recorder.logits[item.key]
        assert len(found) < len(item.prompt_ids) + 4 or len(item.prompt_ids) < 16
        for position, logits in found.items():
            assert torch.equal(logits, invariance.alone[invariance.requests[int(item.request_id)].key][position])


def test_preemption_changes_no_bit(invariance: Invariance) -> None:
    """Sequences that lose their blocks are computed again, prompt and tokens in one."""
    requests = [replace(item, sampling=replace(item.sampling, max_tokens=24)) for item in invariance.requests[1:5]]
    roomy = tiny_engine(
        invariance.config, invariance.weights, kernels=invariance.kernels, num_blocks=120, prefix_cache=False
    )
    wanted = LogitRecorder(roomy.runner)
    tokens = run(roomy.engine, wanted, requests)
    tight = tiny_engine(
        invariance.config,
        invariance.weights,
        kernels=invariance.kernels,
        num_blocks=62,
        prefix_cache=False,
        max_batch_tokens=300,
    )
    recorder = LogitRecorder(tight.runner)
    assert run(tight.engine, recorder, requests) == tokens
    assert tight.engine.stats().num_preemptions > 0
    assert all(torch.equal(recorder.of(item.key), wanted.of(item.key)) for item in requests)


def test_a_seeded_stream_is_the_same_alone_and_in_a_batch(invariance: Invariance) -> None:
    prompts = [(name, item.prompt_ids) for name, item in zip("abcdefgh", invariance.requests, strict=False)]
    requests = [
        request(name, prompt, max_tokens=12, temperature=1.2, top_k=40, top_p=0.95, seed=seed)
        for seed, (name, prompt) in enumerate(prompts)
    ]
    together = tiny_engine(
        invariance.config,
        invariance.weights,
        kernels=invariance.kernels,
        num_blocks=400,
        prefill_chunk=20,
        shuffle_seed=2,
    )
    tokens = run(together.engine, together.runner, requests)
    for item in requests:
        alone = invariance.engine(num_blocks=120)
        assert run(alone.engine, alone.runner, [item])[item.key] == tokens[item.key]


def test_logits_of_sampled_rows_equal_those_of_all_rows(invariance: Invariance) -> None:
    """What the recorder of these tests sees is what the runner samples from."""
    built = tiny_engine(
        invariance.config,
        invariance.weights,
        kernels=invariance.kernels,
        block_size=16,
        num_blocks=120,
        prefix_cache=False,
    )
    for item in invariance.requests[:6]:
        built.engine.handle(Add(item))
    batch = built.engine.begin()
    assert batch is not None
    with torch.inference_mode():
        logits = built.runner.compute(plan_step(batch, built.cache.layout.groups, 16)).logits
    sampling = [item for item in batch.scheduled if item.samples]
    assert len(logits) == len(sampling) >= 5
    for row, item in zip(logits, sampling, strict=True):
        assert torch.equal(row, invariance.alone[item.sequence.key][item.start + item.num_new - 1])


class PlaceMatters(TorchFunctionMode):
    """A machine whose matrix products depend on where in the batch a row is."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        is_linear = func in (torch.nn.functional.linear, torch.ops.mkldnn._linear_pointwise)
        return out + torch.arange(len(out))[:, None] if is_linear else out


def test_a_machine_that_cannot_keep_rows_alike_is_refused_where_batch_invariance_is_wanted() -> None:
    config = tiny_config()
    with PlaceMatters(), pytest.raises(ModelError, match="batch_invariant cannot be had"):
        build_model(config, random_weights(config, seed=0), block_size=4, batch_invariant=True, kernels="torch")
    with PlaceMatters():
        build_model(config, random_weights(config, seed=0), block_size=4, batch_invariant=False, kernels="torch")
