"""Attention on a CUDA device with Llama-8B's heads: decode over the bandwidth of a copy, prefill over torch's own.

    python -m benchmarks.gpu_attention [--quick] [--interpreted] [--json FILE]

1. Decode: sequences of one length over blocks in any order. Bytes are keys and values, each once; the floor is what a
   copy of 2 GiB reaches in the same run. The last two shapes are judged: the others fit into a second-level cache.
2. Prefill: one prompt, from nothing or behind stored blocks, against scaled_dot_product_attention (flash) over keys and
   values that lie side by side, repeated to as many heads beforehand.
3. Each is checked against float64 on some rows before it is timed; batch-invariant tiling is timed beside.
`--interpreted` runs it all once on a processor, on small shapes: that the code is right, no figures.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.device_model import (
    BLOCK_SIZE,
    copy_bandwidth,
    device_name,
    measured_device,
    read_options,
    table,
    tell,
    timed,
)
from kernels.backend import Call, GroupCalls, Heads, Norms
from kernels.triton.attention import attend
from kernels.triton.backend import Plan, TritonBackend

HEADS = Heads(32, 8, 128, 128**-0.5)
SMALL_HEADS = Heads(4, 2, 16, 0.25)
DECODES = ((1, 8192), (16, 2048), (16, 8192), (128, 2048))
PREFILLS = ((0, 2048), (0, 8192), (6144, 2048))
Row = dict[str, object]


class Step:
    """One step's attention in one layer: `num_seqs` sequences with `num_new` tokens behind `before` stored ones."""

    def __init__(
        self, heads: Heads, device: str, num_seqs: int, before: int, num_new: int, is_invariant: bool
    ) -> None:  # fmt: skip
        like = torch.empty(0, dtype=torch.bfloat16, device=device)
        self.heads, self.num_seqs, self.before, self.num_new = heads, num_seqs, before, num_new
        self.backend = TritonBackend(like, is_invariant)
        self.attention = self.backend.attention(heads, Norms(1e-5, wide=False))
        width = -(-(before + num_new) // 128) * 128 // BLOCK_SIZE
        generator = torch.Generator(device).manual_seed(1)
        shape = (num_seqs * width, heads.num_kv_heads, BLOCK_SIZE, heads.head_dim)
        self.k, self.v = (torch.randn(shape, generator=generator, device=device).to(like) for _ in "kv")
        order = torch.randperm(num_seqs * width, generator=torch.Generator().manual_seed(2)).view(num_seqs, width)
        self.blocks = order.numpy()
        rows = num_seqs * num_new
        self.q = torch.randn(rows, heads.width, generator=generator, device=device).to(like)
        self.out = self.q.new_empty(rows, heads.num_heads * heads.head_dim)
        calls = (Call(slice(0, rows), (before,) * num_seqs, num_new, self.blocks),)
        (plan,) = self.attention.plan([GroupCalls(calls, None)], BLOCK_SIZE)
        assert isinstance(plan, Plan)
        self.plan = plan

    def run(self) -> None:
        for work in self.plan.works:
            parts = self.backend.room(work.num_parts, work.part_rows, self.heads)
            attend(
                self.q, self.k, self.v, self.out, work.tasks, parts, self.heads, None, work.tiling,
                self.attention.num_programs,
            )  # fmt: skip

    def captured(self) -> Callable[[], None]:
        """One launch on a device, as in a captured step."""
        if self.q.device.type != "cuda":
            return self.run
        self.run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run()
        return graph.replay

    @property
    def num_bytes(self) -> int:
        return 2 * self.num_seqs * (self.before + self.num_new) * self.heads.num_kv_heads * self.heads.head_dim * 2

    def side_by_side(self, seq: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v: [1, num_heads, tokens, head_dim] of one sequence."""
        heads, rows = self.heads, slice(seq * self.num_new, (seq + 1) * self.num_new)
        q = self.q[rows, : heads.num_heads * heads.head_dim].view(self.num_new, heads.num_heads, -1).transpose(0, 1)
        ids = torch.from_numpy(np.ascontiguousarray(self.blocks[seq])).to(self.q.device)
        k, v = (
            cache[ids].transpose(0, 1).flatten(1, 2)[:, : self.before + self.num_new]
            .repeat_interleave(heads.num_heads // heads.num_kv_heads, dim=0)
            for cache in (self.k, self.v)
        )  # fmt: skip
        return q[None].contiguous(), k[None], v[None]

    def check(self) -> None:
        """The last rows of the last sequence, in float64."""
        self.run()
        q, k, v = (part.double() for part in self.side_by_side(self.num_seqs - 1))
        count = min(4, self.num_new)
        scores = q[:, :, -count:] @ k.transpose(2, 3) * self.heads.scale
        seen = torch.arange(k.shape[2]) < torch.arange(k.shape[2] - count + 1, k.shape[2] + 1)[:, None]
        wanted = scores.masked_fill(~seen.to(scores.device), -torch.inf).softmax(-1) @ v
        got = self.out[-count:].view(count, self.heads.num_heads, -1).transpose(0, 1)[None]
        torch.testing.assert_close(got.double(), wanted, rtol=3e-2, atol=3e-2)


def decode_row(step: Step, device: str, bandwidth: float) -> Row:
    step.check()
    took_s = timed(step.captured(), device)
    return {
        "decode": f"{step.num_seqs} x {step.before}", "invariant": step.backend.is_invariant,
        "us": f"{1e6 * took_s:.0f}", "GB/s": f"{step.num_bytes / took_s / 1e9:.0f}",
        "of copy": round(step.num_bytes / took_s / bandwidth, 3),
    }  # fmt: skip


def prefill_row(step: Step, device: str) -> Row:
    step.check()
    q, k, v = step.side_by_side(0)
    seen = None if not step.before else _behind(step, q.device)

    def theirs() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None, scale=step.heads.scale)

    ours_s, theirs_s = timed(step.captured(), device), timed(theirs, device)
    pairs = step.num_new * (step.before + step.num_new / 2)
    rate = 4 * pairs * step.heads.num_heads * step.heads.head_dim / ours_s
    return {
        "prefill": f"{step.num_new} behind {step.before}", "invariant": step.backend.is_invariant,
        "us": f"{1e6 * ours_s:.0f}", "TFLOP/s": f"{rate / 1e12:.0f}", "torch us": f"{1e6 * theirs_s:.0f}",
        "over torch": round(theirs_s / ours_s, 3),
    }  # fmt: skip


def _behind(step: Step, device: torch.device) -> torch.Tensor:
    """Flash cannot align a causal mask to the end: torch takes another kernel for this one."""
    keys = torch.arange(step.before + step.num_new, device=device)
    return keys <= torch.arange(step.before, step.before + step.num_new, device=device)[:, None]


def main() -> None:
    options = read_options(__doc__ or "")
    device = measured_device(options)
    if device is None:
        return
    heads = SMALL_HEADS if options.interpreted else HEADS
    bandwidth = copy_bandwidth(device, 2**20 if options.interpreted else 2**31)
    decodes = ((2, 90),) if options.interpreted else DECODES[2:] if options.quick else DECODES
    prefills = ((0, 40), (50, 20)) if options.interpreted else PREFILLS[:1] if options.quick else PREFILLS
    print(f"{device_name(device)}; a copy: {bandwidth / 1e9:.0f} GB/s", file=sys.stderr)
    modes = (False, True)
    first = [
        decode_row(Step(heads, device, seqs, context, 1, mode), device, bandwidth)
        for seqs, context in decodes for mode in modes
    ]  # fmt: skip
    second = [
        prefill_row(Step(heads, device, 1, before, num_new, mode), device)
        for before, num_new in prefills for mode in modes
    ]  # fmt: skip
    print(table("\ndecode attention", first))
    print(table("\nprefill attention", second))
    values = {
        "decode over a copy": min(float(str(row["of copy"])) for row in first[-4:] if not row["invariant"]),
        "prefill over torch's flash": min(
            float(str(row["over torch"]))
            for row in second if not row["invariant"] and str(row["prefill"]).endswith(" 0")
        ),
    }  # fmt: skip
    tell("gpu_attention", device, [*first, *second], values, options)


if __name__ == "__main__":
    main()
