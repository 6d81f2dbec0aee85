"""Random models on a device, and the steps that are measured there. Needs torch, Triton and numpy, and of ours only the
engine and the kernels: a GPU machine may have no more."""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import torch

from engine.batch import build_input, plan_step
from engine.engine import Engine, EngineSpec
from engine.kv_cache import KVCache
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder, Results
from engine.models.weights import expected_shapes
from engine.planes import attention_layout
from engine.scheduler import Batch, SchedulerLimits
from engine.types import Add, Adopt, Request, Reserve, SamplingParams
from kernels.dispatch import Kernels, backend_for

TARGETS = Path(__file__).parent / "targets.yaml"
BLOCK_SIZE = 16
LLAMA_8B = ModelConfig(
    vocab_size=128_256, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
    intermediate_size=14_336, rms_norm_eps=1e-5, rope_theta=500_000.0, rope_scaling=None, max_context=16_384,
    tie_embeddings=False, attention_bias=False, mlp_bias=False, eos_token_ids=(), bos_token_id=None,
    architecture="LlamaForCausalLM",
)  # fmt: skip
TINY = ModelConfig(
    vocab_size=96, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48,
    rms_norm_eps=1e-5, rope_theta=10_000.0, rope_scaling=None, max_context=512, tie_embeddings=False,
    attention_bias=False, mlp_bias=False, eos_token_ids=(), bos_token_id=None, architecture="LlamaForCausalLM",
)  # fmt: skip


class DeviceModel:
    """A decoder with random weights over a cache of random keys and values."""

    def __init__(
        self, config: ModelConfig, device: str, dtype: torch.dtype, num_blocks: int, is_invariant: bool = False,
        kernels: Kernels = "auto", drawn_on: str | None = None,
    ) -> None:  # fmt: skip
        """drawn_on: where numbers are drawn; equal places give equal models. The device's own, by default."""
        source = drawn_on or device
        generator = torch.Generator(source).manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=source, dtype=dtype).to(device)

        weights = {
            name: random(*shape) * shape[-1] ** -0.5 if len(shape) > 1 else random(*shape) * 0.1 + ("norm" in name)
            for name, shape in expected_shapes(config).items()
        }
        backend = backend_for(torch.empty(0, dtype=dtype, device=device), kernels, is_invariant)
        name = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype]
        layout = attention_layout(
            config.num_layers, config.num_kv_heads, config.head_dim, BLOCK_SIZE, name, config.layer_windows
        )
        self.config = config
        self.decoder = Decoder(config, weights, backend)
        if is_invariant:
            backend.settle(self.decoder.heads, BLOCK_SIZE, lambda ladders: ladders)
        self.cache = KVCache(layout, num_blocks, device, None)
        for layer in (layer for plane in self.cache.planes.values() for layer in plane):
            layer.copy_(random(*layer.shape))
        self.num_blocks = num_blocks

    def engine(self, max_batch_tokens: int = 8192, prefill_chunk: int = 8192, max_batch_seqs: int = 512) -> Engine:
        limits = SchedulerLimits(
            BLOCK_SIZE, max_batch_tokens, max_batch_seqs, prefill_chunk, prefix_cache=False,
            groups=self.cache.layout.groups,
        )  # fmt: skip
        spec = EngineSpec(limits, self.num_blocks, self.config.max_context, self.config.vocab_size, frozenset(), b"")
        return Engine(spec)

    def decoding(self, contexts: Iterable[int], max_tokens: int = 100) -> tuple[Engine, Batch]:
        """An engine with sequences that have so many tokens, one of them pending; and its next batch."""
        engine = self.engine()
        for number, context in enumerate(contexts):
            *prompt, last = self.prompt(context, number)
            sampling = SamplingParams(max_tokens, temperature=0.0)
            request = Request(str(number), tuple(prompt), sampling, generated_ids=(last,))
            engine.handle(Reserve(request.key, context))
            engine.handle(Adopt(request, context - 1))
        return engine, _next(engine)

    def prompts(self, lengths: Iterable[int], chunk: int = 8192) -> tuple[Engine, Batch]:
        """An engine with so long prompts; and its first batch."""
        engine = self.engine(prefill_chunk=chunk)
        for number, length in enumerate(lengths):
            engine.handle(Add(Request(str(number), self.prompt(length, number), SamplingParams(temperature=0.0))))
        return engine, _next(engine)

    def prompt(self, length: int, seed: int) -> tuple[int, ...]:
        numbers = torch.randint(self.config.vocab_size, (length,), generator=torch.Generator().manual_seed(seed))
        return tuple(numbers.tolist())

    @torch.inference_mode()
    def compute(self, batch: Batch) -> Results:
        """Without a graph."""
        plan = plan_step(batch, self.cache.layout.groups, BLOCK_SIZE)
        decoder = self.decoder
        step = build_input(plan, self.cache.layout.groups, BLOCK_SIZE, decoder.backend, decoder.attention)
        return decoder.forward(step, self.cache)


def _next(engine: Engine) -> Batch:
    batch = engine.begin()
    assert batch is not None, "nothing fits into the pool"
    return batch


def timed(work: Callable[[], object], device: str, rounds: int = 20, warm_up: int = 3) -> float:
    """Seconds of one call, the median of `rounds`. On a device by its own clock, with nothing between two calls."""
    for _ in range(warm_up):
        work()
    if device != "cuda":
        return statistics.median(_wall_s(work) for _ in range(rounds))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(first.elapsed_time(second) / 1e3 for first, second in pairwise(events))


def _wall_s(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def copy_bandwidth(device: str, num_bytes: int) -> float:
    """Bytes per second, read and written."""
    source = torch.zeros(num_bytes // 8, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / timed(lambda: target.copy_(source), device)


def product_rate(device: str, size: int) -> float:
    """Operations per second of a large product in bfloat16, cuBLAS's."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in "ab")
    return 2 * size**3 / timed(lambda: left @ right, device)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "a processor, by Triton's interpreter: no figures"


def promised(section: str) -> dict[str, float]:
    """The section's targets, all of them "at least", out of a file whose parser this machine may not have."""
    lines = TARGETS.read_text().split(f"\n{section}:")[1].split("\n")[1:]
    found = dict[str, float]()
    for line in lines:
        match = re.match(r"  ([^:#]+): \{least: ([0-9.]+)\}", line)
        if not match:
            break
        found[match[1]] = float(match[2])
    return found


def tell(
    section: str, device: str, rows: list[dict[str, object]], values: dict[str, float], options: argparse.Namespace
) -> None:  # fmt: skip
    """Values beside the section's targets, where they are figures; rows and targets as JSON, where that is wanted."""
    targets = [
        {"name": name, "value": values[name], "target": bound, "kind": "least", "met": values[name] >= bound}
        for name, bound in promised(section).items()
    ]
    if not options.interpreted:
        print("\n".join(f"{'met   ' if one['met'] else 'MISSED'} {one['name']}: {one['value']}" for one in targets))
    if options.json:
        told = {"machine": device_name(device), "rows": rows, "targets": targets}
        Path(options.json).write_text(json.dumps(told, indent=1) + "\n")


def measured_device(options: argparse.Namespace) -> str | None:
    """Where to run; None, and it says so, where there is no device."""
    if options.interpreted:
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    print("there is no CUDA device here: nothing was measured")
    return None


def read_options(about: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--interpreted", action="store_true", help="small shapes on a processor; TRITON_INTERPRET=1")
    parser.add_argument("--json", metavar="FILE", help="write rows and targets there too")
    return parser.parse_args()


def table(title: str, rows: list[dict[str, object]]) -> str:
    """Plain text, columns by the first row's names."""
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join([title, *lines])
