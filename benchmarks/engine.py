"""One engine beside its peers: prefill, decode at 1, 4 and 16, and 64 prompts offline.

    python -m benchmarks.engine [--quick] [--threads N] [--rows NAME ...] [--rounds N] [--json FILE]
    python -m benchmarks.engine --threads 2 --against vllm,transformers,llama.cpp [--peers FOLDER]

1. All have the same weights and the same number of threads; the prefix cache is off, so that every prompt is computed.
   Alone it is float32, ours in its default mode, batch-invariant, beside transformers' `generate`, in static batches of
   equally long prompts. With `--against` it is bfloat16, and first of all float32 greedy tokens are checked.
2. Each round runs every row once on every side, in an order that turns. Medians over rounds, with the least and most.
3. What is timed is checked: in float32 both give the same greedy tokens, but for near ties (tests/oracle/compare.py);
   in bfloat16 every peer rounds elsewhere, so how many first tokens are ours is told.
4. Floors are measured in the same run: bytes of the weights over the bandwidth of reading for a decode step, operations
   over those per second of a large matrix product for the rest; the larger of the two.
5. Whole numbers (int8, int4) are rows of their own beside llama.cpp's Q4_1, from which the default model comes.

The whole run takes most of an hour on two slow cores; the row `offline` is nearly all of it. Peers are installed into
FOLDER once (benchmarks/engine_peers.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.engine_against import PEERS, compare_all, names
from benchmarks.engine_peers import DEFAULT_PEERS
from benchmarks.engine_sides import (
    CASES,
    QUICK_CASES,
    Case,
    Ours,
    Prompts,
    Theirs,
    Timed,
    floor_s,
    product_rate,
    read_rate,
    real_prompts,
)
from benchmarks.report import Row, Target, machine, median, print_table, print_targets, spread, target, write_json
from engine.config import EngineConfig, ModelSource
from engine.setup import EngineSetup, plan_engine
from tests.oracle.compare import Expected, Verdict, compare

Rates = dict[str, list[float]]  # by side


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three short rows, three rounds: under a minute")
    parser.add_argument("--threads", type=int, default=1, help="of either side")
    parser.add_argument("--rows", nargs="+", choices=[case.name for case in CASES], help="only these")
    parser.add_argument("--rounds", type=int, help="how often each row runs on either side (5, or 3 with --quick)")
    parser.add_argument("--against", type=names, metavar="A,B", help=f"in bfloat16 beside {', '.join(PEERS)}")
    parser.add_argument("--peers", type=Path, default=DEFAULT_PEERS, metavar="FOLDER", help="where they are installed")
    parser.add_argument("--json", metavar="FILE", help="write rows and targets there too")
    options = parser.parse_args()
    cases = [case for case in (QUICK_CASES if options.quick else CASES) if case.name in (options.rows or case.name)]
    longest = max(case.num_prompts * -(-(case.num_prompt + case.num_new) // 16) for case in cases)
    config = EngineConfig(threads=options.threads, prefix_cache=False, num_blocks=longest + 64)
    setup = plan_engine(ModelSource(), config, hash_key=bytes(16))
    if options.against:
        check_float(setup)
        compare_all(cases, options, config)
        return
    ours, theirs = Ours(setup), Theirs(setup)
    prompts, source = real_prompts(
        setup, max(case.num_prompts for case in cases), max(case.num_prompt for case in cases)
    )
    rounds = options.rounds or (3 if options.quick else 5)
    rates = measure(cases, prompts, ours, theirs, rounds)
    torch.set_num_threads(options.threads)
    peak, bandwidth = product_rate(), read_rate(setup.model)
    rows = [_row(case, rates[case.name], floor_s(case, setup.model, peak, bandwidth)) for case in cases]
    print_table(f"tokens/s, {setup.files.name} in float32, {options.threads} threads, {source}; {machine()}", rows)
    print(f"peak {peak / 1e9:.0f} GFLOP/s, reading {bandwidth / 1e9:.1f} GB/s", end="; ")
    print(f"transformers offline in batches of {theirs.batch_size}")
    targets = [_target(case, rates[case.name]) for case in cases]
    print_targets(targets)
    write_json(options.json, [*rows, {"row": "machine", "peak_flops": peak, "read_bytes_per_s": bandwidth}], targets)


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


def check_float(setup: EngineSetup) -> None:
    """Ours in float32 gives transformers' greedy tokens."""
    ours, theirs = Ours(setup), Theirs(setup)
    prompts, _ = real_prompts(setup, 4, 128)
    check(theirs, prompts, theirs.run(prompts, 16).tokens, ours.run(prompts, 16).tokens, "float32")
    print("float32: greedy tokens are transformers'")


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
