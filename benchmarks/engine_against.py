"""The rows of benchmarks.engine in bfloat16, ours beside every peer, and whole numbers beside llama.cpp's."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from benchmarks.engine_peers import LLAMA, LLAMA_Q4, VLLM, Peer, export, install
from benchmarks.engine_sides import (
    HALF_BYTES,
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
from engine.config import EngineConfig, ModelSource, Quantization
from engine.setup import plan_engine

REST_S = 0.5  # before each run: OpenMP's threads spin for 0.2 s after the one before
WIDE_STEP = 2048  # tokens of a step, vLLM's setting too
TRANSFORMERS = "transformers"
PEERS = (VLLM, TRANSFORMERS, LLAMA)
Rates = dict[str, list[float]]  # by side
Side = Callable[[Prompts, int], Timed]
NUMBERS: tuple[Quantization, ...] = ("int8", "int4")
NUMBER_CASES = ("decode 1", "decode 16")


def compare_all(cases: Sequence[Case], options: argparse.Namespace, config: EngineConfig) -> None:
    """Every row on every side, in turns; then whole numbers."""
    config = config.model_copy(update={"max_batch_tokens": WIDE_STEP, "prefill_chunk": WIDE_STEP})
    setup = plan_engine(ModelSource(dtype="bfloat16"), config, hash_key=bytes(16))
    longest, most = max(case.num_prompt for case in cases), max(case.num_prompts for case in cases)
    prompts, source = real_prompts(setup, most, longest)
    rounds = options.rounds or (3 if options.quick else 5)
    programs = [name for name in options.against if name != TRANSFORMERS]
    install(options.peers, programs)
    models = export(options.peers, programs)
    peers = {name: Peer(name, options.peers, model, options.threads) for name, model in models.items()}
    try:
        sides: dict[str, Side] = {"ours": Ours(setup).run}
        if TRANSFORMERS in options.against:
            sides[TRANSFORMERS] = Theirs(setup, torch.bfloat16).run
        sides |= {name: _program(peer) for name, peer in peers.items() if name != LLAMA_Q4}
        rates, same = in_turns(cases, sides, prompts, rounds)
        numbers: dict[str, Side] = {"ours": sides["ours"]}
        numbers |= {name: Ours(replace(setup, quantization=name)).run for name in NUMBERS}
        if LLAMA_Q4 in peers:
            numbers[LLAMA_Q4] = _program(peers[LLAMA_Q4])
        number_cases = [case for case in cases if case.name in NUMBER_CASES]
        number_rates, _ = in_turns(number_cases, numbers, prompts, rounds)
    finally:
        for peer in peers.values():
            peer.stop()
    torch.set_num_threads(options.threads)
    peak, bandwidth = product_rate(torch.bfloat16), read_rate(setup.model, torch.bfloat16)
    floors = {case.name: floor_s(case, setup.model, peak, bandwidth, HALF_BYTES) for case in cases}
    rows = [_wide_row(case, rates[case.name], floors[case.name], [*sides]) for case in cases]
    print_table(f"tokens/s, {setup.files.name} in bfloat16, {options.threads} threads, {source}; {machine()}", rows)
    print(f"peak {peak / 1e9:.0f} GFLOP/s, reading {bandwidth / 1e9:.1f} GB/s; first tokens that are ours: {same}")
    number_rows = [_wide_row(case, number_rates[case.name], None, [*numbers]) for case in number_cases]
    if number_rows:
        print_table("tokens/s, whole numbers", number_rows)
    targets = [*_wide_targets(cases, rates), *_floor_targets(cases, rates, floors)]
    targets += _number_targets(number_cases, number_rates)
    print_targets(targets)
    machine_row: Row = {"row": "machine", "peak_flops": peak, "read_bytes_per_s": bandwidth}
    write_json(options.json, [*rows, *number_rows, machine_row], targets)


def _program(peer: Peer) -> Side:
    def run(prompts: Prompts, num_new: int) -> Timed:
        answer = peer.run(prompts, num_new)
        return Timed(answer.tokens, answer.total_s, float("nan") if answer.step_s is None else answer.step_s)

    return run


def in_turns(
    cases: Sequence[Case], sides: Mapping[str, Side], prompts: Prompts, rounds: int
) -> tuple[dict[str, Rates], dict[str, str]]:
    """Each case's rates by side; of each side how many first tokens are ours."""
    rates: dict[str, Rates] = {case.name: {} for case in cases}
    same: dict[str, list[bool]] = {}
    for run in sides.values():
        run([prompts[0][:64]], 4)  # warm
    for number, case in itertools.product(range(rounds), cases):
        names = [name for name in sides if _runs(name, case)]
        chosen, tokens = [prompt[: case.num_prompt] for prompt in prompts[: case.num_prompts]], {}
        turn = number % len(names)
        for name in (*names[turn:], *names[:turn]):
            time.sleep(REST_S)
            timed = sides[name](chosen, case.num_new)
            tokens[name] = [one[0] for one in timed.tokens]
            rates[case.name].setdefault(name, []).append(case.rate(timed))
        for name in names:
            pairs = zip(tokens[name], tokens["ours"], strict=True)
            same.setdefault(name, []).extend(theirs == ours for theirs, ours in pairs)
    return rates, {name: f"{sum(equal)}/{len(equal)}" for name, equal in same.items()}


def _runs(name: str, case: Case) -> bool:
    """transformers' static batches would take most of the time of the offline row, and never won it."""
    if name.startswith(LLAMA):
        return case.fits_llama
    return name != TRANSFORMERS or case.name != "offline"


def _wide_row(case: Case, rates: Rates, floor: float | None, sides: Sequence[str]) -> Row:
    row: Row = {"row": f"{case.name}: {case.num_prompts} x {case.num_prompt} in, {case.num_new} out"}
    row |= {name: spread(rates[name]) if name in rates else "-" for name in sides}
    best = max(median(found) for name, found in rates.items() if name != "ours")
    row["ours / best"] = f"{median(rates['ours']) / best:.2f}"
    if floor is not None:
        row["ours / floor"] = f"{median(rates['ours']) / case.rate(Timed([], floor, floor)):.2f}"
    return row


def _wide_targets(cases: Sequence[Case], rates: Mapping[str, Rates]) -> list[Target]:
    """Over the best peer of each row."""
    found: list[Target] = []
    for case in cases:
        best = max((median(each) for name, each in rates[case.name].items() if name != "ours"), default=float("nan"))
        value = median(rates[case.name]["ours"]) / best
        found.append(target("engine_bf16", case.name.replace(" ", "_"), value))
    return found


def _floor_targets(cases: Sequence[Case], rates: Mapping[str, Rates], floors: Mapping[str, float]) -> list[Target]:
    """A single stream may keep to the bandwidth of reading instead."""
    found: list[Target] = []
    for case in cases:
        if case.name == "decode 1":
            best = case.rate(Timed([], floors[case.name], floors[case.name]))
            found.append(target("engine_bf16", "decode_1 of its floor", median(rates[case.name]["ours"]) / best))
    return found


def _number_targets(cases: Sequence[Case], rates: Mapping[str, Rates]) -> list[Target]:
    found: list[Target] = []
    for case in cases:
        own = {name: median(each) for name, each in rates[case.name].items()}
        label = case.name.replace(" ", "_")
        if LLAMA_Q4 in own:
            found.append(target("engine_bf16", f"int4_{label} over llama.cpp Q4_1", own["int4"] / own[LLAMA_Q4]))
        names = ("int8",) if case.num_prompts == 1 else NUMBERS
        found += [target("engine_bf16", f"{name}_{label} over bf16", own[name] / own["ours"]) for name in names]
    return found


def names(text: str) -> list[str]:
    """For argparse."""
    found = text.split(",")
    unknown = set(found) - set(PEERS)
    if unknown:
        raise argparse.ArgumentTypeError(f"no such peer: {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    return found
