"""What batch invariance costs: steps of engines whose bits do not depend on the batch, beside others without that.

    python -m benchmarks.invariance [--quick] [--threads N] [--device cuda] [--json FILE]

1. The default model in float32 and bfloat16: a prompt of 512 tokens, decode steps of 1 and of 16 streams.
2. torch's kernels with `batch_invariant` and without it. With it rows are padded to counts that agree, and where none
   do products are cut into tiles (kernels/reference/ladder.py): that is what it costs.
3. Our native code adds in one order whatever it is given, so that invariance costs nothing by construction. Only in
   bfloat16 with AMX is there a faster way without it, a side of its own there. A GPU has torch's sides alone.
4. Each round runs every step once on every side, in an order that turns; medians over rounds, with the least and most.
5. Streams of different lengths run together and each alone: tokens and logarithms of the likeliest five must be equal
   bit by bit on a side that is invariant. On the others it is told how many are.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from benchmarks.engine_sides import Case, Ours, Prompts, real_prompts
from benchmarks.report import Row, Target, machine, median, print_table, print_targets, spread, target, write_json
from engine.config import EngineConfig, ModelSource
from engine.setup import EngineSetup, plan_engine
from kernels.cpu.native.library import has_amx, load_library

REST_S = 0.5  # before each run: OpenMP's threads spin for 0.2 s after the one before
WIDE_STEP = 512
NUM_LIKELIEST = 5
CASES = (Case("prefill 512", 1, 512, 1), Case("decode 1", 1, 64, 17, True), Case("decode 16", 16, 64, 17, True))
NATIVE, NATIVE_FREE, INVARIANT, FREE = "native", "native, free", "torch, invariant", "torch, free"
Seconds = dict[str, list[float]]  # by side


@dataclass(frozen=True, slots=True)
class Kind:
    """Of a side."""

    kernels: Literal["auto", "torch"]
    is_invariant: bool


def main() -> None:
    options = _options()
    rows: list[Row] = []
    changed, worst = 0, 0.0
    for dtype in ("bfloat16",) if options.quick else ("float32", "bfloat16"):
        kinds = kinds_of(options.device, dtype)
        setups = {name: _setup(dtype, kind, options) for name, kind in kinds.items()}
        prompts, _ = real_prompts(setups[FREE], max(case.num_prompts for case in CASES), WIDE_STEP)
        sides = {name: Ours(setup) for name, setup in setups.items()}
        kept = {name: num_equal(side, staggered(prompts[: 3 if options.quick else 16])) for name, side in sides.items()}
        changed += sum(kept[name].num_changed for name, kind in kinds.items() if kind.is_invariant)
        times = measure(sides, prompts, 2 if options.quick else 7)
        rows += [_row(dtype, case, times[case.name], kept) for case in CASES]
        if NATIVE in kinds:
            worst = max(worst, *(median(one[NATIVE]) / median(one[FREE]) for one in times.values()))
    print_table(f"ms, {options.threads} threads of {_device(options.device)}", rows)
    if NATIVE_FREE not in rows[-1]:
        print("our native code has one way only, which is invariant: that costs it nothing by construction")
    targets = _targets(changed, worst)
    print_targets(targets)
    write_json(options.json, rows, targets)
    if changed:
        raise SystemExit("wrong: bits depend on the batch where they must not")


def kinds_of(device: str, dtype: str) -> dict[str, Kind]:
    found = {INVARIANT: Kind("torch", True), FREE: Kind("torch", False)}
    if device == "cpu" and load_library() is not None:
        found = {NATIVE: Kind("auto", True)} | found
        if dtype == "bfloat16" and has_amx():
            found[NATIVE_FREE] = Kind("auto", False)
    return found


# --- bits -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kept:
    """How many streams have the same bits alone and together."""

    num_equal: int
    num_streams: int

    @property
    def num_changed(self) -> int:
        return self.num_streams - self.num_equal

    def __str__(self) -> str:
        return f"{self.num_equal}/{self.num_streams}"


def staggered(prompts: Prompts) -> Prompts:
    """Of lengths that fit no tile."""
    return [prompt[: 17 + 29 * number] for number, prompt in enumerate(prompts)]


def num_equal(side: Ours, prompts: Prompts) -> Kept:
    together = side.run(prompts, 9, NUM_LIKELIEST)
    equal = 0
    for number, prompt in enumerate(prompts):
        alone = side.run([prompt], 9, NUM_LIKELIEST)
        assert len(alone.logprobs[0]) == 9
        equal += alone.tokens[0] == together.tokens[number] and alone.logprobs[0] == together.logprobs[number]
    return Kept(equal, len(prompts))


# --- times ----------------------------------------------------------------------------------------------------


def measure(sides: Mapping[str, Ours], prompts: Prompts, rounds: int) -> dict[str, Seconds]:
    """Of each case by side, in turns. Engines are warm: they have been checked."""
    times: dict[str, Seconds] = {case.name: {name: [] for name in sides} for case in CASES}
    names = list(sides)
    for number in range(rounds):
        turn = number % len(names)
        for case in CASES:
            chosen = [prompt[: case.num_prompt] for prompt in prompts[: case.num_prompts]]
            for name in (*names[turn:], *names[:turn]):
                time.sleep(REST_S)
                timed = sides[name].run(chosen, case.num_new)
                times[case.name][name].append(timed.step_s if case.per_step else timed.total_s)
        print(f"round {number + 1} of {rounds}", flush=True)
    return times


def _row(dtype: str, case: Case, times: Seconds, kept: Mapping[str, Kept]) -> Row:
    row: Row = {"type": dtype, "step": case.name}
    row |= {name: spread([1e3 * one for one in found]) for name, found in times.items()}
    row["torch, cost"] = f"{median(times[INVARIANT]) / median(times[FREE]) - 1:+.0%}"
    if NATIVE_FREE in times:
        row["native, cost"] = f"{median(times[NATIVE]) / median(times[NATIVE_FREE]) - 1:+.0%}"
    row["equal bits"] = ", ".join(str(one) for one in kept.values())
    return row


def _targets(changed: int, worst: float) -> list[Target]:
    found = [target("invariance", "streams whose bits change", changed)]
    return [*found, target("invariance", "native over free torch", worst)] if worst else found


def _setup(dtype: str, kind: Kind, options: argparse.Namespace) -> EngineSetup:
    config = EngineConfig(
        device=options.device, runner="thread", threads=options.threads, prefix_cache=False, num_blocks=512,
        max_batch_tokens=WIDE_STEP, prefill_chunk=WIDE_STEP, kernels=kind.kernels, batch_invariant=kind.is_invariant,
    )  # fmt: skip
    return plan_engine(ModelSource.model_validate({"dtype": dtype}), config, hash_key=bytes(16))


def _device(name: str) -> str:
    return machine() if name == "cpu" else torch.cuda.get_device_name()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="bfloat16 only, two rounds: under a minute")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", metavar="FILE", help="write rows and targets there too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
