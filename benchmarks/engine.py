"""One engine beside transformers' `generate`: prefill, decode at 1, 4 and 16, and 64 prompts offline, in float32.

    python -m benchmarks.engine [--quick] [--threads N] [--rows NAME ...] [--rounds N] [--json FILE]

1. Both have the same weights and the same number of threads; ours runs in its default mode, batch-invariant, with the
   prefix cache off so that every prompt is computed. transformers gets static batches of equally long prompts.
2. Each round runs every row once on either side, first one, then the other first. Medians over rounds.
3. What is timed is checked: both give the same greedy tokens, but for near ties (tests/oracle/compare.py).
4. Floors are measured in the same run: bytes of the weights over the bandwidth of reading for a decode step, operations
   over those per second of a large matrix product for the rest; the larger of the two.

The whole run takes most of an hour on two slow cores; the row `offline` is nearly all of it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.report import Row, Target, machine, median, print_table, print_targets, spread, target, write_json
from benchmarks.texts import prompt_texts
from engine.build import build_engine
from engine.config import EngineConfig, ModelSource
from engine.models.config import ModelConfig
from engine.models.tokenizer import load_tokenizer
from engine.models.weights import load_weights
from engine.setup import EngineSetup, plan_engine
from engine.types import Add, FinishReason, Request, SamplingParams
from tests.oracle.compare import Expected, Verdict, compare

Prompts = Sequence[tuple[int, ...]]
BATCH_SIZES = (4, 8, 16)  # of transformers, offline
FLOAT_BYTES = 4
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
    """One run of a case. step_s: the median step in which every sequence decoded."""

    tokens: list[list[int]]
    total_s: float
    step_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three short rows, three rounds: under a minute")
    parser.add_argument("--threads", type=int, default=1, help="of either side")
    parser.add_argument("--rows", nargs="+", choices=[case.name for case in CASES], help="only these")
    parser.add_argument("--rounds", type=int, help="how often each row runs on either side (5, or 3 with --quick)")
    parser.add_argument("--json", metavar="FILE", help="write rows and targets there too")
    options = parser.parse_args()
    cases = [case for case in (QUICK_CASES if options.quick else CASES) if case.name in (options.rows or case.name)]
    longest = max(case.num_prompts * -(-(case.num_prompt + case.num_new) // 16) for case in cases)
    config = EngineConfig(threads=options.threads, prefix_cache=False, num_blocks=longest + 64)
    setup = plan_engine(ModelSource(), config, hash_key=bytes(16))
    ours, theirs = Ours(setup), Theirs(setup)
    prompts, source = real_prompts(
        setup, max(case.num_prompts for case in cases), max(case.num_prompt for case in cases)
    )
    rounds = options.rounds or (3 if options.quick else 5)
    rates = measure(cases, prompts, ours, theirs, rounds)
    peak, bandwidth = product_rate(), read_rate(setup.model)
    rows = [_row(case, rates[case.name], floor_s(case, setup.model, peak, bandwidth)) for case in cases]
    print_table(f"tokens/s, {setup.files.name} in float32, {options.threads} threads, {source}; {machine()}", rows)
    print(f"peak {peak / 1e9:.0f} GFLOP/s, reading {bandwidth / 1e9:.1f} GB/s", end="; ")
    print(f"transformers offline in batches of {theirs.batch_size}")
    targets = [_target(case, rates[case.name]) for case in cases]
    print_targets(targets)
    write_json(options.json, [*rows, {"row": "machine", "peak_flops": peak, "read_bytes_per_s": bandwidth}], targets)


Rates = dict[str, list[float]]  # by side


def measure(cases: Sequence[Case], prompts: Prompts, ours: Ours, theirs: Theirs, rounds: int) -> dict[str, Rates]:
    """Each case's rates by side. Ends the program if the tokens differ."""
    sides: dict[str, Ours | Theirs] = {"ours": ours, "theirs": theirs}
    rates: dict[str, Rates] = {case.name: {name: [] for name in sides} for case in cases}
    for side in sides.values():
        side.run([prompts[0][:64]], 4)  # warm
    for number in range(rounds):
        order = list(sides)[:: 1 if number % 2 == 0 else -1]
        for case in cases:
            chosen = [prompt[: case.num_prompt] for prompt in prompts[: case.num_prompts]]
            timed = {name: sides[name].run(chosen, case.num_new) for name in order}
            for name, one in timed.items():
                rates[case.name][name].append(case.rate(one))
            check(theirs, chosen, timed["theirs"].tokens, timed["ours"].tokens, case.name)
    return rates


class Ours:
    """One engine, driven as a step runner drives it."""

    def __init__(self, setup: EngineSetup) -> None:
        built = build_engine(setup, None)
        self._engine, self._runner = built.engine, built.runner

    def run(self, prompts: Prompts, num_new: int) -> Timed:
        engine, params = self._engine, SamplingParams(max_tokens=num_new, temperature=0.0, ignore_eos=True)
        requests = [Request(f"{index}", prompt, params) for index, prompt in enumerate(prompts)]
        tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
        steps: list[float] = []
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
            if batch.num_tokens == len(batch.scheduled) == len(prompts):
                steps.append(time.perf_counter() - step_begun)
        return Timed(list(tokens.values()), time.perf_counter() - begun, median(steps))


class Theirs:
    """transformers' own Llama and its `generate`, in static batches."""

    def __init__(self, setup: EngineSetup) -> None:
        try:
            from tests.oracle.reference import load_model

            self.model = load_model(setup.model, load_weights(setup.files, setup.model, torch.float32))
        except ImportError as error:
            raise SystemExit(f"transformers is needed, a development dependency (make setup): {error}") from None
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


def check(theirs: Theirs, prompts: Prompts, wanted: list[list[int]], got: list[list[int]], name: str) -> None:
    for prompt, right, ours in zip(prompts, wanted, got, strict=True):
        if right == ours:
            continue
        step = next((at for at, pair in enumerate(zip(right, ours, strict=False)) if pair[0] != pair[1]), 0)
        gap = theirs.gap((*prompt, *right[:step]))
        outcome = compare(Expected(tuple(right), gap, {step: gap}), ours)
        print(f"{name}: {outcome.verdict}, {outcome.details}")
        if outcome.verdict is Verdict.WRONG:
            raise SystemExit("wrong: tokens differ from transformers'")


def real_prompts(setup: EngineSetup, count: int, length: int) -> tuple[list[tuple[int, ...]], str]:
    tokenizer = load_tokenizer(setup.files, setup.model)
    texts, source = prompt_texts(count, length * CHARS_PER_TOKEN)
    prompts = [tuple(tokenizer.encode(text)[:length]) for text in texts]
    assert all(len(prompt) == length for prompt in prompts)
    return prompts, source


# --- floors ---------------------------------------------------------------------------------------------------


def floor_s(case: Case, model: ModelConfig, peak: float, bandwidth: float) -> float:
    """Seconds that the case takes at least; of one step where only steps count."""
    weights = model.num_layers * _layer_weights(model)
    head = model.vocab_size * model.hidden_size
    step = max((weights + head) * FLOAT_BYTES / bandwidth, 2 * (weights + head) * case.num_prompts / peak)
    if case.per_step:
        return step
    scores = (
        4 * model.num_layers * model.num_heads * model.head_dim * case.num_prompt**2 / 2
    )  # two products, half unseen
    return case.num_prompts * (2 * weights * case.num_prompt + scores) / peak + (case.num_new - 1) * step


def _layer_weights(model: ModelConfig) -> int:
    attention = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    return model.hidden_size * (attention + 3 * model.intermediate_size)


def product_rate() -> float:
    """Operations per second of a large float32 product, with the threads of the run."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return 2 * 1024**3 / best_s(lambda: torch.mm(a, b))


def read_rate(model: ModelConfig) -> float:
    """Bytes per second of reading as much as the weights are."""
    buffer = torch.ones(model.num_layers * _layer_weights(model) + model.vocab_size * model.hidden_size)
    return buffer.numel() * FLOAT_BYTES / best_s(buffer.sum)


def best_s(work: Callable[[], object]) -> float:
    """The shortest of ten runs: a floor."""
    times = []
    for _ in range(10):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)


# --- the table ------------------------------------------------------------------------------------------------


def _row(case: Case, rates: Rates, floor: float) -> Row:
    ours, theirs = median(rates["ours"]), median(rates["theirs"])
    best = case.rate(Timed([], floor, floor))
    return {
        "row": f"{case.name}: {case.num_prompts} x {case.num_prompt} in, {case.num_new} out",
        "ours": spread(rates["ours"]),
        "transformers": spread(rates["theirs"]),
        "ratio": f"{ours / theirs:.2f}",
        "floor": f"{best:.1f}",
        "ours / floor": f"{ours / best:.2f}",
    }


def _target(case: Case, rates: Rates) -> Target:
    return target("engine", case.name.replace(" ", "_"), median(rates["ours"]) / median(rates["theirs"]))


if __name__ == "__main__":
    main()
