"""Whole steps on a CUDA device with Llama-8B's shape and random weights: over the floor of the device.

    python -m benchmarks.gpu_engine [--quick] [--interpreted] [--json FILE]

1. Limits, in the same run: the bandwidth of a copy of 2 GiB, and the rate of an 8,192-cubed product in bfloat16.
2. A decode step of 1, 16 and 128 sequences: a captured graph with sampling on the device, against the bytes of weights
   and of the keys and values that it reads; and what the processor takes to prepare it, which another step hides.
3. A prompt's step, against the operations of its products and of attention at the measured rate.
4. The same with batch invariance: what it costs.
Before it is timed, a graph's logits must be those of the same step without one, and the step's tokens the greatest.
`--interpreted` runs it all once on a processor, on a tiny model: that the code is right, no figures.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.device_model import (
    BLOCK_SIZE,
    LLAMA_8B,
    TINY,
    DeviceModel,
    copy_bandwidth,
    device_name,
    measured_device,
    product_rate,
    read_options,
    table,
    tell,
    timed,
)
from engine.batch import plan_step
from engine.batch_sampler import BatchSampler
from engine.decode_graphs import CudaCapture, DecodeGraphs
from engine.models.config import ModelConfig
from engine.scheduler import Batch

CONTEXT = 1024
DECODES = (1, 16, 128)
PROMPTS = (2048, 8192)
Row = dict[str, object]


@dataclass(frozen=True, slots=True)
class Limits:
    bandwidth: float  # bytes per second, read and written
    product_rate: float  # operations per second


def num_parameters(config: ModelConfig) -> int:
    """Of the layers, and of the head."""
    width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    layer = config.hidden_size * (width + config.num_heads * config.head_dim + 3 * config.intermediate_size)
    return config.num_layers * layer + config.vocab_size * config.hidden_size


def kv_bytes(config: ModelConfig) -> int:
    """Of one position."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2


def decode_row(model: DeviceModel, graphs: DecodeGraphs, batch: Batch, device: str, limits: Limits) -> Row:
    sampler = BatchSampler(model.decoder.backend)
    plan = plan_step(batch, model.cache.layout.groups, BLOCK_SIZE)
    with torch.inference_mode():
        eager = model.compute(batch).logits.clone()
        torch.testing.assert_close(graphs.run(plan, None).logits, eager, rtol=2e-2, atol=2e-2)
        tokens = sampler.choose(eager, batch.scheduled)
        assert torch.equal(tokens, eager.argmax(dim=1)), "greedy"

        def prepared() -> None:
            graphs.run(plan_step(batch, model.cache.layout.groups, BLOCK_SIZE), tokens)

        def step() -> None:
            sampler.choose(graphs.run(plan, tokens).logits, batch.scheduled)

        took_s, eager_s = timed(step, device), timed(lambda: model.compute(batch), device, rounds=5)
        host_s = timed(prepared, "cpu", rounds=5)
    num_positions = sum(item.start + 1 for item in batch.scheduled)
    config = model.config
    floor_s = (2 * num_parameters(config) + num_positions * kv_bytes(config)) / limits.bandwidth
    return {
        "step": f"decode {len(batch.scheduled)} at {batch.scheduled[0].start + 1}", "ms": f"{1e3 * took_s:.2f}",
        "floor ms": f"{1e3 * floor_s:.2f}", "floor / step": round(floor_s / took_s, 3),
        "without a graph ms": f"{1e3 * eager_s:.2f}", "prepared in ms": f"{1e3 * host_s:.2f}",
    }  # fmt: skip


def prefill_row(model: DeviceModel, batch: Batch, device: str, limits: Limits) -> Row:
    config, num_new = model.config, batch.num_tokens
    operations = 2 * num_new * (num_parameters(config) - config.vocab_size * config.hidden_size)
    operations += 4 * config.num_layers * config.num_heads * config.head_dim * num_new * (num_new + 1) / 2
    took_s = timed(lambda: model.compute(batch), device, rounds=5)
    rate = operations / took_s
    return {
        "step": f"prefill {num_new}", "ms": f"{1e3 * took_s:.2f}",
        "floor ms": f"{1e3 * operations / limits.product_rate:.2f}",
        "floor / step": round(rate / limits.product_rate, 3), "without a graph ms": "", "prepared in ms": "",
    }  # fmt: skip


def rows_of(config: ModelConfig, device: str, is_invariant: bool, limits: Limits, quick: bool) -> list[Row]:
    tiny = device == "cpu"
    counts = (1, 2) if tiny else DECODES[:2] if quick else DECODES
    context = 40 if tiny else CONTEXT
    num_blocks = (max(counts) + 1) * -(-context // BLOCK_SIZE) + (8 if tiny else 1024)
    dtype = torch.float32 if tiny else torch.bfloat16
    model = DeviceModel(config, device, dtype, num_blocks, is_invariant, kernels="triton")
    capture = _run_again if tiny else CudaCapture()
    graphs = DecodeGraphs(model.decoder, model.cache, BLOCK_SIZE, max(counts), capture)
    rows = [
        decode_row(model, graphs, model.decoding([context] * count)[1], device, limits) for count in counts
    ]  # fmt: skip
    prompts = (20,) if tiny else PROMPTS[:1] if quick else PROMPTS
    rows += [prefill_row(model, model.prompts([length])[1], device, limits) for length in prompts]
    return [{"step": row.pop("step"), "invariant": is_invariant, **row} for row in rows]


def _run_again(work: Callable[[], None]) -> Callable[[], None]:
    """A Capture for a processor."""
    work()
    return work


def main() -> None:
    options = read_options(__doc__ or "")
    device = measured_device(options)
    if device is None:
        return
    tiny = options.interpreted
    limits = Limits(copy_bandwidth(device, 2**20 if tiny else 2**31), product_rate(device, 64 if tiny else 8192))
    print(
        f"{device_name(device)}; a copy: {limits.bandwidth / 1e9:.0f} GB/s, a product: "
        f"{limits.product_rate / 1e12:.0f} TFLOP/s", file=sys.stderr,
    )  # fmt: skip
    rows = list[Row]()
    for is_invariant in (False, True):
        rows += rows_of(TINY if tiny else LLAMA_8B, device, is_invariant, limits, options.quick)
    print(table("\nsteps", rows))
    free = {str(row["step"]): float(str(row["floor / step"])) for row in rows if not row["invariant"]}
    values = {
        "decode step over the floor": min(value for step, value in free.items() if step.startswith("decode")),
        "prefill over a product's rate": min(value for step, value in free.items() if step.startswith("prefill")),
    }
    tell("gpu_engine", device, rows, values, options)


if __name__ == "__main__":
    main()
