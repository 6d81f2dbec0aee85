"""How far an engine's step is from what this machine can do: operations and bytes of a prefill and of a decode step.

    python -m benchmarks.roofline [--quick] [--threads N] [--dtype bfloat16] [--quantization int8] [--kernels torch]
        [--json FILE]

1. The machine's limits are measured in the same run, in turns with the steps: the rate of a large matrix product by
   torch, and the bandwidth of reading a buffer as large as the model's weights, in huge pages and in small ones.
2. A step's floor is the larger of its operations over that rate and its bytes over that bandwidth: weights once, keys
   and values of every sequence once. What is between (norms, softmax, Python) counts for nothing.
3. Steps are those of the engine itself, from the scheduler to the sampled token; medians. A token that was decoded in a
   batch must be the one that follows the same tokens as a prompt.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.engine_sides import Ours, best_s, product_rate, real_prompts
from benchmarks.report import Row, machine, median, print_table, spread, write_json
from engine.config import EngineConfig, ModelSource
from engine.models.config import ModelConfig
from engine.setup import EngineSetup, plan_engine
from kernels.cpu.native.space import Space

BITS = {"none": 0, "int8": 8, "int4": 5}  # int4: with a scale and a shift in float16 for each 32
WIDE_STEP = 2048


@dataclass(frozen=True, slots=True)
class Step:
    """`num_seqs` sequences of `context` positions that decode, or one prompt of so many (num_seqs 0)."""

    num_seqs: int
    context: int

    @property
    def name(self) -> str:
        return f"decode {self.num_seqs} at {self.context}" if self.num_seqs else f"prefill {self.context}"


STEPS = (Step(0, 128), Step(0, 512), Step(0, 2048), *(Step(count, 512) for count in (1, 4, 16)), Step(16, 64))
QUICK_STEPS = (Step(0, 512), Step(1, 64), Step(16, 64))


@dataclass(frozen=True, slots=True)
class Work:
    """Of one step."""

    operations: float
    num_bytes: float

    def floor_s(self, peak: float, bandwidth: float) -> float:
        return max(self.operations / peak, self.num_bytes / bandwidth)


def main() -> None:
    options = _options()
    config = EngineConfig(
        threads=options.threads, prefix_cache=False, num_blocks=1024, max_batch_tokens=WIDE_STEP,
        prefill_chunk=WIDE_STEP, batch_invariant=True, kernels=options.kernels,
    )  # fmt: skip
    source = ModelSource(dtype=options.dtype, quantization=options.quantization)
    setup = plan_engine(source, config, hash_key=bytes(16))
    steps = QUICK_STEPS if options.quick else STEPS
    rounds = 3 if options.quick else 7
    ours = Ours(setup)
    prompts, _ = real_prompts(setup, 16, max(step.context for step in steps))
    limits, times = measure(steps, setup, ours, prompts, options.threads, rounds)
    peak, bandwidth = max(limits["operations/s"]), max(limits["bytes/s, huge pages"])
    rows = [_row(step, times[step], work(step, setup), peak, bandwidth) for step in steps]
    numbers = f"{options.dtype}, quantization {options.quantization}, kernels {options.kernels}"
    title = f"{setup.files.name} in {numbers}, {options.threads} threads"
    print_table(f"{title}; {machine()}", rows)
    for name, found in limits.items():
        print(f"10^9 {name}: {spread([one / 1e9 for one in found])}")
    print("floors are by the best of each")
    write_json(options.json, [*rows, {"row": "machine", **{name: median(found) for name, found in limits.items()}}], [])


def measure(
    steps: Sequence[Step], setup: EngineSetup, ours: Ours, prompts: Sequence[tuple[int, ...]], threads: int, rounds: int
) -> tuple[dict[str, list[float]], dict[Step, list[float]]]:
    """The machine's limits and the steps' seconds, in turns."""
    small = torch.ones(int(weight_bytes(setup)) // 4)
    huge = Space().take(small.numel() * 4).view(torch.float32).fill_(1)
    times: dict[Step, list[float]] = {step: [] for step in steps}
    limits: dict[str, list[float]] = {"operations/s": [], "bytes/s, huge pages": [], "bytes/s, small pages": []}
    for _ in range(rounds):
        torch.set_num_threads(threads)
        limits["operations/s"].append(product_rate(getattr(torch, setup.dtype)))
        for name, buffer in (("huge", huge), ("small", small)):
            limits[f"bytes/s, {name} pages"].append(buffer.numel() * 4 / best_s(buffer.sum))
        time.sleep(0.3)  # torch's threads spin for a while
        for step in steps:
            times[step].append(_seconds(step, ours, prompts))
    return limits, times


def _seconds(step: Step, ours: Ours, prompts: Sequence[tuple[int, ...]]) -> float:
    if not step.num_seqs:
        return ours.run([prompts[0][: step.context]], 1).total_s
    chosen = [prompt[: step.context] for prompt in prompts[: step.num_seqs]]
    timed = ours.run(chosen, 17)
    again = ours.run([(*chosen[0], *timed.tokens[0][:16])], 1)
    if again.tokens[0][0] != timed.tokens[0][16]:
        raise SystemExit("wrong: a decoded token is not the one of a prompt that ends with those before it")
    return timed.step_s


# --- floors ---------------------------------------------------------------------------------------------------


def work(step: Step, setup: EngineSetup) -> Work:
    model, count = setup.model, max(1, step.num_seqs)
    layers = model.num_layers * layer_weights(model)
    head = model.vocab_size * model.hidden_size
    kv_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_dim * getattr(torch, setup.dtype).itemsize
    pairs = step.num_seqs * step.context if step.num_seqs else step.context**2 / 2  # of queries and keys
    scores = 4 * model.num_layers * model.num_heads * model.head_dim * pairs
    rows = step.num_seqs or step.context
    return Work(2 * layers * rows + 2 * head * count + scores, weight_bytes(setup) + kv_bytes * count * step.context)


def layer_weights(model: ModelConfig) -> int:
    attention = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    return model.hidden_size * (attention + 3 * model.intermediate_size)


def weight_bytes(setup: EngineSetup) -> float:
    """Of all linear layers, as a step reads them; with whole numbers the head has 8 bits."""
    plain = getattr(torch, setup.dtype).itemsize * 8
    bits = BITS[setup.quantization] or plain
    head = setup.model.vocab_size * setup.model.hidden_size * (plain if bits == plain else 8)
    return (setup.model.num_layers * layer_weights(setup.model) * bits + head) / 8


def _row(step: Step, seconds: Sequence[float], work: Work, peak: float, bandwidth: float) -> Row:
    floor = work.floor_s(peak, bandwidth)
    return {
        "step": step.name, "GFLOP": f"{work.operations / 1e9:.2f}", "MB": f"{work.num_bytes / 1e6:.0f}",
        "bound by": "operations" if work.operations / peak > work.num_bytes / bandwidth else "bytes",
        "floor ms": f"{1e3 * floor:.2f}", "ours ms": spread([1e3 * one for one in seconds], digits=2),
        "floor / ours": f"{floor / median(seconds):.2f}",
    }  # fmt: skip


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three steps, three rounds: under a minute")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--quantization", choices=list(BITS), default="none")
    parser.add_argument("--kernels", choices=["auto", "torch"], default="auto", help="as engine.kernels")
    parser.add_argument("--json", metavar="FILE", help="write rows there too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
