"""What it takes to choose the next tokens of 16 streams from a vocabulary of 49,152, beside the step before that.

    python -m benchmarks.sampling [--quick] [--threads N] [--json FILE]

1. Logits are those of an engine with the default model after real prompts; the same run measures its decode step of 16.
2. The same tokens are chosen by the C++ library and by the sampler that goes row by row in numpy (they must be equal);
   torch's softmax, sort and multinomial, which other engines use, draw others.
All in turns, medians. The share is of the step, sampling left out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.engine_sides import Prompts, real_prompts
from benchmarks.report import Row, Target, machine, median, print_table, print_targets, spread, target, write_json
from engine.batch import plan_step
from engine.batch_sampler import draws_of
from engine.build import BuiltEngine, build_engine
from engine.config import EngineConfig, ModelSource
from engine.sampler import sample
from engine.setup import plan_engine
from engine.types import Add, Request, SamplingParams
from kernels.backend import Choose

NUM_STREAMS, CONTEXT = 16, 64
KINDS = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature 1": SamplingParams(temperature=1.0),
    "temperature 0.8, top-p 0.9": SamplingParams(temperature=0.8, top_p=0.9),
    "temperature 0.8, top-k 50": SamplingParams(temperature=0.8, top_k=50),
}


def decoded(built: BuiltEngine, prompts: Prompts, num_new: int) -> tuple[torch.Tensor, float]:
    """Logits of the last step in which all decode, and how long such a step takes to them."""
    engine, runner, times = built.engine, built.runner, list[float]()
    params, logits = SamplingParams(max_tokens=num_new, temperature=0.0, ignore_eos=True), torch.empty(0)
    for index, prompt in enumerate(prompts):
        engine.handle(Add(Request(str(index), prompt, params)))
    while (batch := engine.begin()) is not None:
        begun = time.perf_counter()
        results = runner.compute(plan_step(batch, built.cache.layout.groups, runner.block_size))
        if batch.num_tokens == len(batch.scheduled) == len(prompts):
            times.append(time.perf_counter() - begun)
            logits = results.logits
        engine.finish(batch, runner.sampled(batch, results))
        engine.take_outputs()
    return logits.clone(), median(times)


def by_torch(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    if params.temperature == 0:
        return logits.argmax(dim=1)
    scaled = logits / params.temperature
    if params.top_k:
        scaled = scaled.masked_fill(scaled < scaled.topk(params.top_k).values[:, -1:], -torch.inf)
    shares = scaled.softmax(-1)
    if params.top_p < 1:
        ordered, order = shares.sort(dim=1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(1) - ordered >= params.top_p, 0)
        shares = torch.zeros_like(shares).scatter_(1, order, ordered)
    return shares.multinomial(1)


def measured_row(
    name: str, logits: torch.Tensor, choose: Choose, step_s: float, rounds: int
) -> tuple[Row, float]:  # fmt: skip
    params = [replace(KINDS[name], seed=7 * row) for row in range(len(logits))]
    draws, rows = draws_of(params, range(len(params))), logits.numpy()
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: choose(logits, draws),
        "row by row": lambda: [sample(row, one, at) for at, (row, one) in enumerate(zip(rows, params, strict=True))],
        "torch": lambda: by_torch(logits, params[0]),
    }
    assert choose(logits, draws).tolist() == ways["row by row"](), "other tokens than the sampler's"
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, work in ways.items():
            begun = time.perf_counter()
            work()
            times[way].append(time.perf_counter() - begun)
    share = median(times["ours"]) / step_s
    row: Row = {"16 rows": name, **{f"{way} ms": spread([1e3 * one for one in took]) for way, took in times.items()}}
    row |= {"over row by row": f"{median(times['row by row']) / median(times['ours']):.1f}"}
    row |= {"over torch": f"{median(times['torch']) / median(times['ours']):.1f}", "of a step": f"{share:.1%}"}
    return row, share


def main() -> None:
    options = _options()
    config = EngineConfig(
        threads=options.threads, prefix_cache=False, num_blocks=1024, max_batch_tokens=NUM_STREAMS * CONTEXT,
        prefill_chunk=CONTEXT,
    )  # fmt: skip
    setup = plan_engine(ModelSource(dtype="bfloat16"), config, hash_key=bytes(16))
    built = build_engine(setup, None)
    choose = built.runner.model.backend.choose
    if choose is None:
        print("there is no native code on this machine: nothing to compare")
        return
    prompts, _ = real_prompts(setup, NUM_STREAMS, CONTEXT)
    logits, step_s = decoded(built, prompts, 20 if options.quick else 60)
    rows, targets = [], list[Target]()
    for name in KINDS:
        row, share = measured_row(name, logits, choose, step_s, 5 if options.quick else 30)
        rows.append(row)
        targets.append(target("sampling", f"share of a step, {name}", share))
    print_table(f"a decode step of {NUM_STREAMS}: {1e3 * step_s:.1f} ms; {options.threads} threads; {machine()}", rows)
    print_targets(targets)
    write_json(options.json, rows, targets)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few rounds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", metavar="FILE", help="write rows and targets there too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
