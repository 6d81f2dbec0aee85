"""A whole decoder on a CUDA device: against the same in plain torch on the processor, and bit for bit against itself.

Needs torch, Triton and pytest only. On a machine without a device these tests are not selected.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from benchmarks.device_model import BLOCK_SIZE, TINY, DeviceModel
from engine.decode_graphs import CudaCapture, DecodeGraphs
from engine.device_runner import DeviceRunner
from engine.kv_cache import KVCache
from engine.models.config import ModelConfig, MoeConfig
from engine.models.decoder import Decoder
from engine.types import Add, Request, Sampled, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
LLAMA = replace(TINY, hidden_size=128, num_heads=8, num_kv_heads=2, head_dim=64, intermediate_size=192, vocab_size=300)
WINDOWED = replace(LLAMA, qk_norm=True, layer_windows=(20, None), local_rope_theta=1000.0, head_dim=32)
EXPERTS = replace(LLAMA, moe=MoeConfig(10, 3, intermediate_size=72, normalize=True, layer_ids=(0, 1)))
CONFIGS = pytest.mark.parametrize(
    "config", [LLAMA, WINDOWED, EXPERTS], ids=["llama", "windows, normed heads", "experts"]
)  # fmt: skip
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
NUM_BLOCKS = 120
GREEDY = SamplingParams(max_tokens=9, temperature=0.0)
DRAWN = SamplingParams(max_tokens=9, temperature=0.9, seed=5)


@dataclass
class Parts:
    """What a DeviceRunner runs, of engine.model_runner.TorchRunner."""

    model: Decoder
    cache: KVCache
    block_size: int = BLOCK_SIZE


def model_on(device: str, config: ModelConfig, dtype: torch.dtype, is_invariant: bool = False) -> DeviceModel:
    """Equal on both. What no token has stored is NaN."""
    kernels = "triton" if device == "cuda" else "torch"
    model = DeviceModel(config, device, dtype, NUM_BLOCKS, is_invariant, kernels, drawn_on="cpu")
    model.cache.fill(float("nan"))
    return model


def asked(model: DeviceModel, lengths: dict[str, int], params: SamplingParams = GREEDY) -> list[Request]:
    return [Request(name, model.prompt(length, length), params) for name, length in lengths.items()]


def logits_of(model: DeviceModel, requests: list[Request], chunk: int = 8192) -> dict[str, torch.Tensor]:
    """Of each request: [prompt's last position and what follows, vocab], step after step without graphs. Greedy."""
    engine, found = model.engine(prefill_chunk=chunk), {one.request_id: [] for one in requests}
    for one in requests:
        engine.handle(Add(one))
    while (batch := engine.begin()) is not None:
        rows = iter(model.compute(batch).logits)
        sampled = []
        for item in batch.scheduled:
            row = next(rows) if item.samples else None
            found[item.sequence.key.request_id] += [] if row is None else [row.cpu()]
            sampled.append(Sampled() if row is None else Sampled((int(row.argmax()),)))
        engine.finish(batch, sampled)
        engine.take_outputs()
    return {name: torch.stack(rows) for name, rows in found.items()}


def tokens_of(model: DeviceModel, runner: DeviceRunner, requests: list[Request], ahead: bool) -> dict[str, list[int]]:
    """As engine/step_runner.py drives it."""
    engine, found = model.engine(), {one.request_id: [] for one in requests}
    for one in requests:
        engine.handle(Add(one))
    batch = engine.begin()
    launched = runner.launch(batch) if batch else None
    while batch is not None and launched is not None:
        following = engine.ahead(batch) if ahead else None
        next_launched = None
        if following is not None and runner.can_follow(launched, following):
            next_launched = runner.launch(following, after=launched)
        engine.finish(batch, runner.collect(launched))
        for output in engine.take_outputs().tokens:
            found[output.key.request_id] += output.token_ids
        batch, launched = (following, next_launched) if next_launched is not None else (engine.begin(), None)
        launched = launched or (runner.launch(batch) if batch else None)
    return found


@CONFIGS
@DTYPES
def test_logits_are_those_of_plain_torch_on_the_processor(config: ModelConfig, dtype: torch.dtype) -> None:
    if config is EXPERTS and dtype == torch.bfloat16:
        pytest.skip("of experts that are nearly equal, roundings decide: kernels are compared with given ones")
    tolerance = 2e-3 if dtype == torch.float32 else 0.1
    ours, theirs = model_on("cuda", config, dtype), model_on("cpu", config, dtype)
    for lengths in ({"a": 37}, {"a": 5, "b": 150, "c": 1}):
        requests = asked(theirs, lengths, replace(GREEDY, max_tokens=1))
        wanted, got = logits_of(theirs, requests), logits_of(ours, requests)
        for name in lengths:
            torch.testing.assert_close(got[name], wanted[name], rtol=tolerance, atol=tolerance)


@CONFIGS
@DTYPES
def test_a_sequence_has_its_bits_in_any_batch_and_chunk(config: ModelConfig, dtype: torch.dtype) -> None:
    model = model_on("cuda", config, dtype, is_invariant=True)
    requests = asked(model, {"a": 140, "b": 3, "c": 60})
    together = logits_of(model, requests)
    for chunk in (8192, 7):
        for one in requests:
            model.cache.fill(float("nan"))
            alone = logits_of(model, [one], chunk)[one.request_id]
            assert torch.equal(alone, together[one.request_id])


@CONFIGS
@DTYPES
@pytest.mark.parametrize("ahead", [False, True], ids=["one by one", "ahead"])
def test_graphs_give_the_tokens_of_steps_without_them(config: ModelConfig, dtype: torch.dtype, ahead: bool) -> None:
    model = model_on("cuda", config, dtype, is_invariant=True)
    graphs = DecodeGraphs(model.decoder, model.cache, BLOCK_SIZE, 5, CudaCapture())
    parts = Parts(model.decoder, model.cache)
    for lengths in ({"a": 37}, {"a": 20, "b": 150, "c": 1}, {str(length): length for length in range(2, 7)}):
        requests = [*asked(model, {"drawn": 9}, DRAWN), *asked(model, lengths)][:5]
        plain = tokens_of(model, DeviceRunner(parts, None), requests, ahead=False)  # pyright: ignore[reportArgumentType]
        captured = tokens_of(model, DeviceRunner(parts, graphs), requests, ahead)  # pyright: ignore[reportArgumentType]
        assert captured == plain
