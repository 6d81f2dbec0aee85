"""Triton's kernels as machine code, with no GPU: what each takes of a processor's registers and shared memory.

    python -m benchmarks.kernel_code [--quick] [--json FILE]

1. A layer of Llama-8B's shape, and one of Gemma's, is computed on tensors without memory, as a decode step and as a
   chunk of a prompt, free and batch-invariant; so are the experts of Qwen3-30B-A3B's layers, and of Mixtral's.
   Launches are recorded with the arguments that they come with.
2. Each different one is compiled for sm_80 (A100) and sm_90 (H100), as Triton would compile it there.
3. ptxas says what it makes of it. A spill is a register that went to memory: the target is none.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.report import Row, print_table, print_targets, target, write_json

os.environ.pop("TRITON_INTERPRET", None)  # read when kernels are loaded
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as on a device; said, Triton does not warn of it

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from kernels.backend import Call, Draws, GroupCalls, GroupPlace, Heads, Norms, Routing
from kernels.triton import linear, records, sampling
from kernels.triton.backend import TritonBackend

CAPABILITIES = (80, 90)
MOST_SHARED = {80: 166_912, 90: 232_448}  # bytes of a thread block (CUDA C++ Programming Guide, compute capabilities)
_PTXAS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers", re.DOTALL)
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
_TYPES = {
    torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel as it is compiled for the arguments of one launch. All but the function are sorted pairs."""

    function: Any  # a JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    aligned: tuple[int, ...]  # arguments that are multiples of 16
    options: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, function: JITFunction, args: tuple[object, ...], kwargs: dict[str, object]) -> Launch:
        given = dict(zip(function.arg_names, args, strict=False)) | kwargs
        signature, constants, aligned = dict[str, str](), dict[str, object](), list[int]()
        for index, parameter in enumerate(function.params):
            value = given[parameter.name]
            if parameter.is_constexpr or (type(value) is int and value == 1 and not parameter.do_not_specialize):
                signature[parameter.name] = "constexpr"
                constants[parameter.name] = value
                continue
            signature[parameter.name] = _type_of(value)
            if isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0):
                aligned += [] if parameter.do_not_specialize else [index]
        options = {name: value for name, value in given.items() if name in _OPTIONS}
        return cls(function, _pairs(signature), _pairs(constants), tuple(aligned), _pairs(options))

    @property
    def about(self) -> str:
        """What tells it from other launches of its kernel."""
        chosen = {
            "ROWS", "TILE_ROWS", "COLUMNS", "INNER", "GATHERED", "KEYS", "SPLIT", "HEAD_DIM", "WINDOWED", "WIDTH",
            "TANH", "WIDE", "HAS_NORMS", "TO_SLOT",
        }  # fmt: skip
        return ", ".join(f"{name}={value}" for name, value in self.constants if name in chosen)

    def compile(self, capability: int) -> triton.compiler.CompiledKernel:
        order = {name: index for index, name in enumerate(self.function.arg_names)}
        signature = dict(sorted(self.signature, key=lambda pair: order[pair[0]]))
        attrs = {(index,): [["tt.divisibility", 16]] for index in self.aligned}
        source = ASTSource(self.function, signature, dict(self.constants), attrs)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(self.options))


def _pairs(of: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(of.items()))


def _type_of(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    assert isinstance(value, int)
    return "i32" if abs(value) < 2**31 else "i64"


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches within are not run, but kept, each once."""
    kept = list[Launch]()

    def run(function: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        launch = Launch.of(function, args, kwargs)
        if launch not in kept:
            kept.append(launch)

    with patch.object(JITFunction, "run", run):
        yield kept


def compute_layer(heads: Heads, hidden: int, window: int | None, wide: bool, is_invariant: bool, num_new: int) -> None:
    """The parts of a layer for one sequence with so many new tokens, and 4,000 before them."""
    like = torch.empty(0, dtype=torch.bfloat16, device="meta")
    backend, norms = TritonBackend(like, is_invariant), Norms(1e-6, wide)
    backend.num_programs = 264
    attention, size, start = backend.attention(heads, norms), 16, 4000
    blocks = np.zeros((1, -(-(start + num_new) // 128) * 128 // size), np.int64)
    (plan,) = attention.plan([GroupCalls((Call(slice(0, num_new), (start,), num_new, blocks),), window)], size)
    cache = like.new_empty(500, heads.num_kv_heads, size, heads.head_dim)
    numbers = torch.empty(num_new, dtype=torch.int64, device="meta")
    table = torch.empty(8192, heads.head_dim // 2, device="meta")
    place = GroupPlace(numbers, numbers, attention.turns(table, table, numbers), plan)
    weight, norm = like.new_empty(heads.width, hidden), like.new_empty(hidden)
    x, added = (like.new_empty(num_new, hidden) for _ in "ab")
    backend.add_norm(x, added, norm, norms)
    backend.add_norm(x, None, norm, norms)
    head_norm = like.new_empty(heads.head_dim) if wide else None
    attention.attend(backend.linear(weight, None)(x), head_norm, head_norm, cache, cache, place)
    backend.linear(weight, None, "gelu_tanh" if wide else "silu")(x)


def compute_experts(
    hidden: int, inner: int, routing: Routing, is_invariant: bool, num_new: int, dtype: torch.dtype = torch.bfloat16
) -> None:
    """A layer's experts, for so many rows."""
    like = torch.empty(0, dtype=dtype, device="meta")
    gate_ups, downs = (
        (like.new_empty(shape) for _ in range(routing.num_experts)) for shape in ((2 * inner, hidden), (hidden, inner))
    )
    mixture = TritonBackend(like, is_invariant).mixture(gate_ups, downs, "silu", routing, 16)
    mixture(like.new_empty(num_new, hidden), like.new_empty(num_new, routing.num_experts))


def launches(quick: bool) -> list[Launch]:
    qwen3, mixtral = Routing(128, 8, True), Routing(8, 2, True)
    llama, gemma = Heads(32, 8, 128, 128**-0.5), Heads(4, 1, 256, 256**-0.5)
    with recorded() as kept:
        for is_invariant in (False, True):
            for num_new in (1, 512):
                compute_layer(llama, 4096, None, wide=False, is_invariant=is_invariant, num_new=num_new)
                if not quick:
                    compute_layer(gemma, 640, 512, wide=True, is_invariant=is_invariant, num_new=num_new)
            for num_new in (1, 512, 8192):
                compute_experts(2048, 768, qwen3, is_invariant, num_new)
                if not quick:
                    compute_experts(4096, 14_336, mixtral, is_invariant, num_new)
        compute_experts(2048, 768, qwen3, is_invariant=True, num_new=512, dtype=torch.float32)
        linear.multiply(torch.empty(512, 4096, device="meta"), torch.empty(6144, 4096, device="meta"), None)
        plane = torch.empty(32, 100, 16384, dtype=torch.bfloat16, device="meta")
        ids, slot = torch.empty(8, dtype=torch.int64, device="meta"), plane.new_empty(4, 8, 16384)
        records.gather_records(plane, 0, ids, slot)
        records.scatter_records(plane, 0, ids, slot)
        logits = torch.empty(16, 128_256, device="meta")
        ones, numbers = np.ones(16), np.zeros(16, np.int64)
        sampling.choose(logits, Draws(ones, numbers, ones, 0 * ones, numbers, numbers))
    return kept


def usage(ptx: str, capability: int) -> tuple[int, int]:
    """Registers of a thread, and bytes that it spills, as ptxas says."""
    assembler = get_ptxas(capability).path
    (arch,) = re.findall(r"\.target (\w+)", ptx)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [assembler, "-v", f"-arch={arch}", source, "-o", Path(folder, "kernel.cubin")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = _PTXAS.search(done.stderr)
    assert found is not None, f"ptxas ended with {done.returncode}: {done.stdout}{done.stderr}"
    stores, loads, registers = map(int, found.groups())
    return registers, stores + loads


def main() -> None:
    options = _options()
    rows, num_spilt, most_shared = list[Row](), 0, 0.0
    found = launches(options.quick)
    for number, launch in enumerate(found, start=1):
        for capability in CAPABILITIES:
            print(f"\r{number} of {len(found)}: {launch.function.__name__:<24}", end="", file=sys.stderr, flush=True)
            made = launch.compile(capability)
            assert made.asm["cubin"], "no machine code"
            registers, spilt = usage(made.asm["ptx"], capability)
            num_spilt += spilt > 0
            most_shared = max(most_shared, made.metadata.shared / MOST_SHARED[capability])
            rows.append({
                "kernel": launch.function.__name__, "as": launch.about, "sm": capability, "registers": registers,
                "spilt bytes": spilt, "shared bytes": made.metadata.shared, "warps": made.metadata.num_warps,
                "code bytes": len(made.asm["cubin"]),
            })  # fmt: skip
    print(file=sys.stderr)
    targets = [
        target("kernel_code", "kernels that spill", num_spilt),
        target("kernel_code", "shared memory over what a device has", most_shared),
    ]
    print_table("Triton's kernels as machine code", rows)
    print_targets(targets)
    write_json(options.json, rows, targets)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="Llama's and Qwen3's shapes only")
    parser.add_argument("--json", metavar="FILE", help="write rows and targets there too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
