"""What a grammar costs: a mask's time per token, and a decode step with constrained answers beside one without.

    python -m benchmarks.grammar [--quick] [--model NAME] [--json FILE]

1. Mask: one answer is followed token by token over the model's vocabulary, and each mask is timed.
2. Steps: 1, 4 and 16 answers by one engine, all without a grammar, then all with one; alternating rounds, medians
   of the steps in which all of them decode.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from benchmarks.report import Row, machine, median, print_table, write_json
from engine.build import BuiltEngine, build_engine, grammars_of
from engine.config import EngineConfig, ModelSource
from engine.models.tokenizer import load_tokenizer
from engine.sequence import Sequence
from engine.setup import EngineSetup, plan_engine
from engine.types import Add, FinishReason, Request, SamplingParams
from router.grammar import json_schema_grammar

BATCHES = (1, 4, 16)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 40},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 40},
        "size": {"type": "number"},
    },
    "required": ["name", "tags", "size"],
    "additionalProperties": False,
}
MILLI = 1e3


def step_times(built: BuiltEngine, prompt: tuple[int, ...], num: int, params: SamplingParams) -> list[float]:
    """Seconds of each step in which all of these answers decode."""
    steps: list[float] = []
    for index in range(num):
        built.engine.handle(Add(Request(f"{index}", prompt, params)))
    while built.engine.has_work:
        begun = time.perf_counter()
        batch = built.engine.begin()
        assert batch is not None, "work, but nothing to compute"
        built.engine.finish(batch, built.runner.execute(batch))
        for output in built.engine.take_outputs().tokens:
            assert output.finish is not FinishReason.ERROR, output.error
        if batch.num_tokens == len(batch.scheduled) == num:
            steps.append(time.perf_counter() - begun)
    return steps


def mask_times(setup: EngineSetup, prompt: tuple[int, ...], params: SamplingParams, num: int) -> list[float]:
    """Seconds of each mask of `num` answers together, whose tokens are drawn from what is allowed; compiling is left
    out."""
    grammars, chance = grammars_of(setup), np.random.default_rng(0)
    sequences = [Sequence.from_request(Request(f"{index}", prompt, params)) for index in range(num)]
    grammars.masks(sequences)
    times: list[float] = []
    for _ in range(params.max_tokens):
        begun = time.perf_counter()
        masks = grammars.masks(sequences)
        times.append(time.perf_counter() - begun)
        for sequence, mask in zip(sequences, masks, strict=True):
            assert isinstance(mask, np.ndarray), mask
            allowed = np.setdiff1d(np.flatnonzero(mask), setup.model.eos_token_ids)
            if len(allowed) == 0:
                return times
            sequence.tokens.append(int(chance.choice(allowed)))
    return times


def _row(num: int, masks: list[float], free: list[float], bound: list[float]) -> Row:
    return {
        "answers": num,
        "mask ms": f"{median(masks) * MILLI:.3f}",
        "mask ms per answer": f"{median(masks) / num * MILLI:.3f}",
        "step ms": f"{median(free) * MILLI:.2f}",
        "step ms, constrained": f"{median(bound) * MILLI:.2f}",
        "overhead": f"{median(bound) / median(free) - 1:+.1%}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two short rounds")
    parser.add_argument("--model", default=ModelSource().name)
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    options = parser.parse_args()
    setup = plan_engine(ModelSource(name=options.model), EngineConfig(prefix_cache=False), hash_key=bytes(16))
    built, prompt = build_engine(setup, None), tuple(load_tokenizer(setup.files, setup.model).encode("Tell me of it. "))
    num_rounds, num_new = (2, 8) if options.quick else (5, 100)
    free = SamplingParams(max_tokens=num_new, ignore_eos=True, seed=1)
    bound = SamplingParams(max_tokens=num_new, seed=1, grammar=json_schema_grammar(SCHEMA))
    rows: list[Row] = []
    step_times(built, prompt, 1, bound)  # the vocabulary is read, the grammar compiled
    for num in BATCHES:
        steps: dict[bool, list[float]] = {False: [], True: []}
        for number in range(num_rounds):
            for is_bound in (number % 2 == 0, number % 2 == 1):
                steps[is_bound] += step_times(built, prompt, num, bound if is_bound else free)
        masks = mask_times(setup, prompt, bound, num)
        rows.append(_row(num, masks, steps[False], steps[True]))
    print_table(f"grammar, {setup.files.name}, vocabulary of {setup.model.vocab_size}; {machine()}", rows)
    write_json(options.json, rows, [])


if __name__ == "__main__":
    main()
