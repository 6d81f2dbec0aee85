"""Perplexity of the default model with weights as they are given: by our engine, and by transformers.

1. A text is cut into windows of equal length. Each is a prompt of its own, whose first token is not judged.
2. Ours is the engine's own log probabilities of prompts, from the scheduler to the sampler; the engine is built as
   engine/build.py builds it, but of weights that may have been altered.
3. transformers' model gets the same windows, and weights in float32.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence

import torch

from benchmarks.engine_sides import CHARS_PER_TOKEN
from engine.engine import Engine
from engine.kv_cache import KVCache
from engine.model_runner import TorchRunner, build_model
from engine.models.config import ModelConfig
from engine.models.decoder import Weights
from engine.setup import EngineSetup
from engine.types import Add, FinishReason, Request, SamplingParams
from kernels.reference.quantized import Bits
from tests.oracle.prompts import data_texts, has_data, own_texts, source, tokenizer
from tests.oracle.reference import load_model

WINDOW = 512  # tokens
Windows = Sequence[tuple[int, ...]]


def text_windows(count: int) -> tuple[Windows, str]:
    """Of real texts where they are at hand, always the same ones; and where they come from."""
    texts = [text for _, text in (data_texts() if has_data() else own_texts())]
    random.Random(0).shuffle(texts)
    ids = tokenizer().encode("\n\n".join(texts)[: count * WINDOW * CHARS_PER_TOKEN])
    windows = [tuple(ids[start : start + WINDOW]) for start in range(0, count * WINDOW, WINDOW)]
    assert len(windows[-1]) == WINDOW, "the text is too short"
    return windows, source()


def our_perplexity(setup: EngineSetup, weights: Weights, windows: Windows, bits: Bits = 16) -> float:
    """With so many bits of linear layers' weights. `weights` are left alone."""
    torch.set_num_threads(setup.config.threads)
    block_size = setup.config.block_size
    with torch.inference_mode():
        model = build_model(setup.model, dict(weights), block_size, setup.batch_invariant, bits=bits)
        cache = KVCache(setup.layout, setup.spec.num_blocks, setup.config.device, None)
    runner, engine = TorchRunner(model, cache, block_size), Engine(setup.spec, None)
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    logprobs: list[float] = []
    for number, window in enumerate(windows):
        engine.handle(Add(Request(f"{number}", window, params)))
        while engine.has_work:
            batch = engine.begin()
            assert batch is not None, "work, but nothing to compute"
            engine.finish(batch, runner.execute(batch))
            for output in engine.take_outputs().tokens:
                assert output.finish is not FinishReason.ERROR, output.error
                logprobs += [one.logprob for one in output.prompt_logprobs]
    assert len(logprobs) == len(windows) * (WINDOW - 1)
    return math.exp(-statistics.fmean(logprobs))


def their_perplexity(config: ModelConfig, weights: Weights, windows: Windows, num_threads: int) -> float:
    """transformers', in the weights' type."""
    torch.set_num_threads(num_threads)  # ours may have left torch one
    model, logprobs = load_model(config, weights), []
    with torch.inference_mode():
        for window in windows:
            ids = torch.tensor([window])
            known = model(ids).logits[0, :-1].log_softmax(dim=1)
            logprobs += known.gather(1, ids[0, 1:, None])[:, 0].tolist()
    return math.exp(-statistics.fmean(logprobs))
