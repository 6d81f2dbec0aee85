"""A decoder over Triton's kernels, by the interpreter or on a device: equal to transformers, for short prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.batch import build_input, plan_step
from engine.types import Add
from tests.engine.test_families import FAMILIES
from tests.engine.tiny import LogitRecorder, hf_model, random_prompt, random_weights, request, run, tiny_engine
from tests.kernels.interpreted import ON_DEVICE

pytestmark = pytest.mark.skipif(ON_DEVICE, reason="the kernels were loaded for the device")
NAMES = ("llama", "qwen3 with biases and a window", "gemma3", "mixtral", "qwen3 moe")


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


class NothingIsAsked(TorchDispatchMode):
    """Refuses what would wait for a device: numbers that come back from it, and shapes that depend on them."""

    REFUSED = (
        "_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "bincount", "repeat_interleave",
        "equal", "is_nonzero",
    )  # fmt: skip

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.REFUSED, f"{name} waits for the device"
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        masks = [index for index in indices if index is not None and index.dtype in (torch.bool, torch.uint8)]
        assert not masks, f"{name} by a mask waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> NothingIsAsked:
    def refuse(tensor: torch.Tensor) -> list[object]:
        raise AssertionError("tolist waits for the device")

    monkeypatch.setattr(torch.Tensor, "tolist", refuse)  # which no mode sees on a processor
    return NothingIsAsked()


WAITS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x[0].item(), "tolist": lambda x: x.tolist(), "truth": lambda x: bool(x[0] > 0),
    "nonzero": lambda x: x.nonzero(), "mask": lambda x: x[x > 0], "stored by mask": lambda x: x.clone()[x > 0],
}  # fmt: skip


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_for_a_device_is_seen(name: str, nothing_is_asked: NothingIsAsked) -> None:
    with pytest.raises(AssertionError, match="waits for the device"), nothing_is_asked:
        WAITS[name](torch.ones(3))


@pytest.mark.parametrize("name", ["mixtral", "qwen3 moe, weights as they are"])
def test_a_step_with_experts_does_not_wait_for_the_device(name: str, nothing_is_asked: NothingIsAsked) -> None:
    config = FAMILIES[name]
    built = tiny_engine(config, random_weights(config, seed=3), kernels="triton", prefix_cache=False)
    for length in (1, 7):
        built.engine.handle(Add(request(str(length), random_prompt(config, length, length), max_tokens=2)))
    batch = built.engine.begin()
    assert batch is not None and batch.num_tokens == 8
    groups, model = built.cache.layout.groups, built.runner.model
    plan = plan_step(batch, groups, built.runner.block_size)
    step = build_input(plan, groups, built.runner.block_size, model.backend, model.attention)
    with torch.inference_mode(), nothing_is_asked:
        assert model.forward(step, built.cache).logits.shape == (2, config.vocab_size)
