"""What benchmarks.engine times: its rows, ours, transformers, prompts, and the floors of this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.report import median
from benchmarks.texts import prompt_texts
from engine.build import build_engine
from engine.models.config import ModelConfig
from engine.models.tokenizer import load_tokenizer
from engine.models.weights import load_weights
from engine.setup import EngineSetup
from engine.types import Add, FinishReason, Request, SamplingParams, TokenLogprob
from kernels.cpu.packed import can_pack

Prompts = Sequence[tuple[int, ...]]
BATCH_SIZES = (4, 8, 16)  # of transformers, offline
FLOAT_BYTES, HALF_BYTES = 4, 2
CHARS_PER_TOKEN = 6  # more than any text has


@dataclass(frozen=True, slots=True)
class Case:
    """One row: so many prompts of so many tokens, and so many new ones. `per_step`: only decode steps are counted."""

    name: str
    num_prompts: int
    num_prompt: int
    num_new: int
    per_step: bool = False

    def rate(self, timed: Timed) -> float:
        """Tokens per second: of prompts where there is one new token, else new ones."""
        if self.per_step:
            return self.num_prompts / timed.step_s
        return self.num_prompts * (self.num_prompt if self.num_new == 1 else self.num_new) / timed.total_s

    @property
    def fits_llama(self) -> bool:
        """Its binding decodes one sequence at a time."""
        return self.num_prompts == 1


CASES = (
    Case("prefill 512", 1, 512, 1),
    Case("prefill 2048", 1, 2048, 1),
    Case("decode 1", 1, 64, 33, per_step=True),
    Case("decode 4", 4, 64, 33, per_step=True),
    Case("decode 16", 16, 64, 33, per_step=True),
    Case("offline", 64, 512, 128),
)
QUICK_CASES = (Case("prefill 512", 1, 512, 1), Case("decode 1", 1, 32, 9, True), Case("decode 4", 4, 32, 9, True))


@dataclass(frozen=True, slots=True)
class Timed:
    """One run of a case. step_s: the median step in which every sequence decoded. logprobs: of each token, where they
    were asked for."""

    tokens: list[list[int]]
    total_s: float
    step_s: float
    logprobs: list[list[TokenLogprob]] = field(default_factory=list)


class Ours:
    """One engine, driven as a step runner drives it."""

    def __init__(self, setup: EngineSetup) -> None:
        built = build_engine(setup, None)
        self._engine, self._runner = built.engine, built.runner
        self._torch_threads = torch.get_num_threads()  # native code leaves torch one

    def run(self, prompts: Prompts, num_new: int, num_logprobs: int = -1) -> Timed:
        engine = self._engine
        params = SamplingParams(max_tokens=num_new, temperature=0.0, ignore_eos=True, logprobs=num_logprobs)
        requests = [Request(f"{index}", prompt, params) for index, prompt in enumerate(prompts)]
        tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
        logprobs: dict[str, list[TokenLogprob]] = {request.request_id: [] for request in requests}
        steps: list[float] = []
        torch.set_num_threads(self._torch_threads)
        begun = time.perf_counter()
        for request in requests:
            engine.handle(Add(request))
        while engine.has_work:
            step_begun = time.perf_counter()
            batch = engine.begin()
            assert batch is not None, "work, but nothing to compute"
            engine.finish(batch, self._runner.execute(batch))
            for output in engine.take_outputs().tokens:
                assert output.finish is not FinishReason.ERROR, output.error
                tokens[output.key.request_id] += output.token_ids
                logprobs[output.key.request_id] += output.logprobs
            if batch.num_tokens == len(batch.scheduled) == len(prompts):
                steps.append(time.perf_counter() - step_begun)
        total_s = time.perf_counter() - begun
        return Timed(list(tokens.values()), total_s, median(steps), list(logprobs.values()))


class Theirs:
    """transformers' own Llama and its `generate`, in static batches."""

    def __init__(self, setup: EngineSetup, dtype: torch.dtype = torch.float32) -> None:
        try:
            from tests.oracle.reference import load_model

            self.model = load_model(setup.model, load_weights(setup.files, setup.model, torch.float32))
            self.model.to(dtype)  # pyright: ignore[reportArgumentType] - its stub asks for more
        except ImportError as error:
            raise SystemExit(f"transformers is needed, a development dependency (make setup): {error}") from None
        self._threads = setup.config.threads
        self.batch_size = max(BATCH_SIZES)
        self._is_tuned = False

    def run(self, prompts: Prompts, num_new: int) -> Timed:
        if len(prompts) > max(BATCH_SIZES):
            return self._run_offline(prompts, num_new)
        return self._generate(prompts, num_new)

    def _run_offline(self, prompts: Prompts, num_new: int) -> Timed:
        """In batches of the size at which the first prompts went fastest, which is not timed."""
        if not self._is_tuned:
            cost = {size: self._generate(prompts[:size], num_new).total_s / size for size in BATCH_SIZES}
            self.batch_size, self._is_tuned = min(cost, key=cost.__getitem__), True
        starts = range(0, len(prompts), self.batch_size)
        parts = [self._generate(prompts[start : start + self.batch_size], num_new) for start in starts]
        return Timed([one for part in parts for one in part.tokens], sum(part.total_s for part in parts), float("nan"))

    def _generate(self, prompts: Prompts, num_new: int) -> Timed:
        torch.set_num_threads(self._threads)  # ours may have left torch one
        ids, clock = torch.tensor(prompts), StepClock()
        begun = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(  # pyright: ignore[reportAttributeAccessIssue] - its stub asks for more
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_new, eos_token_id=None,
                pad_token_id=0, streamer=clock,
            )  # fmt: skip
        total_s = time.perf_counter() - begun
        steps = [after - before for before, after in zip(clock.times[1:], clock.times[2:], strict=False)]
        return Timed(out[:, ids.shape[1] :].tolist(), total_s, median(steps))

    @torch.inference_mode()
    def gap(self, token_ids: Sequence[int]) -> float:
        """How far the best two logits of the next token are apart."""
        best = self.model(torch.tensor([list(token_ids)]), logits_to_keep=1).logits[0, -1].topk(2).values
        return float(best[0] - best[1])


class StepClock:
    """A streamer of `generate` that notes when the prompt was put, and each token after it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def real_prompts(setup: EngineSetup, count: int, length: int) -> tuple[list[tuple[int, ...]], str]:
    tokenizer = load_tokenizer(setup.files, setup.model)
    texts, source = prompt_texts(count, length * CHARS_PER_TOKEN)
    prompts = [tuple(tokenizer.encode(text)[:length]) for text in texts]
    assert all(len(prompt) == length for prompt in prompts)
    return prompts, source


# --- floors ---------------------------------------------------------------------------------------------------


def floor_s(
    case: Case, model: ModelConfig, peak: float, bandwidth: float, weight_bytes: int = FLOAT_BYTES
) -> float:  # fmt: skip
    """Seconds that the case takes at least; of one step where only steps count."""
    weights = model.num_layers * _layer_weights(model)
    head = model.vocab_size * model.hidden_size
    step = max((weights + head) * weight_bytes / bandwidth, 2 * (weights + head) * case.num_prompts / peak)
    if case.per_step:
        return step
    scores = (
        4 * model.num_layers * model.num_heads * model.head_dim * case.num_prompt**2 / 2
    )  # two products, half unseen
    return case.num_prompts * (2 * weights * case.num_prompt + scores) / peak + (case.num_new - 1) * step


def _layer_weights(model: ModelConfig) -> int:
    attention = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    return model.hidden_size * (attention + 3 * model.intermediate_size)


def product_rate(dtype: torch.dtype = torch.float32) -> float:
    """Operations per second of a large product, with the threads of the run; of floats where this processor has none of
    that type."""
    dtype = dtype if can_pack(dtype) else torch.float32
    a, b = torch.randn(1024, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    return 2 * 1024**3 / best_s(lambda: torch.mm(a, b))


def read_rate(model: ModelConfig, dtype: torch.dtype = torch.float32) -> float:
    """Bytes per second of reading as much as the weights are."""
    num_bytes = (model.num_layers * _layer_weights(model) + model.vocab_size * model.hidden_size) * dtype.itemsize
    buffer = torch.ones(num_bytes // FLOAT_BYTES)
    return num_bytes / best_s(buffer.sum)


def best_s(work: Callable[[], object]) -> float:
    """The shortest of ten runs: a floor."""
    times = []
    for _ in range(10):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)
