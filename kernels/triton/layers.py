"""The pointwise parts of a layer: norms with the addition before them, and gates (kernels/reference/layers.py).

A program computes a whole row, or a part of one that needs nothing of the rest, so no row's bits depend on another.
"""

# Triton's language is Python to its parser, not to its types.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.backend import Gate, Norms

_GATE_TILE = 1024  # elements of a program
_GATES: dict[Gate, bool] = {"silu": False, "gelu_tanh": True}


@triton.jit
def _add_rms_norm(
    hidden, added, weight, out, width, eps, HAS_ADDED: tl.constexpr, WIDE: tl.constexpr, WIDTH: tl.constexpr
):  # hidden, added, out: [rows, width]; WIDTH: the power of two that holds it
    row = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, WIDTH)
    inside = at < width
    x = tl.load(hidden + row + at, mask=inside, other=0.0)
    if HAS_ADDED:
        x = (x.to(tl.float32) + tl.load(added + row + at, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(hidden + row + at, x, mask=inside)
    full = x.to(tl.float32)
    full *= tl.rsqrt(tl.sum(full * full, 0) / width + eps)
    factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if not WIDE:
        full = full.to(x.dtype).to(tl.float32)
    tl.store(out + row + at, (full * factor).to(x.dtype), mask=inside)


def add_rms_norm(hidden: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, norms: Norms) -> torch.Tensor:
    """hidden: [rows, width], to which `added` is added in place -> the norm of that. All contiguous."""
    out = torch.empty_like(hidden)
    rows, width = hidden.shape
    if rows:
        _add_rms_norm[(rows,)](
            hidden, hidden if added is None else added, weight, out, width, norms.eps,
            HAS_ADDED=added is not None, WIDE=norms.wide, WIDTH=triton.next_power_of_2(width),
            num_warps=4 if width <= 2048 else 8,
        )  # fmt: skip
    return out


@triton.jit
def _gate_and_mul(x, out, width, TANH: tl.constexpr, TILE: tl.constexpr):  # x: [rows, 2 * width], out: [rows, width]
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = at < width
    gate = tl.load(x + row * 2 * width + at, mask=inside, other=0.0)
    up = tl.load(x + row * 2 * width + width + at, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    if TANH:
        inner = -1.5957691216057308 * wide * (1 + 0.044715 * wide * wide)  # -2 sqrt(2 / pi)
    else:
        inner = -wide
    gated = (wide / (1 + tl.exp(inner))).to(gate.dtype).to(tl.float32)
    tl.store(out + row * width + at, (gated * up.to(tl.float32)).to(gate.dtype), mask=inside)


def gate_and_mul(x: torch.Tensor, gate: Gate) -> torch.Tensor:
    """x: [rows, 2 * width], gate first, contiguous -> act(gate) * up, [rows, width]."""
    rows, width = x.shape[0], x.shape[1] // 2
    out = x.new_empty(rows, width)
    if rows:
        grid = (rows, triton.cdiv(width, _GATE_TILE))
        _gate_and_mul[grid](x, out, width, TANH=_GATES[gate], TILE=_GATE_TILE)
    return out
