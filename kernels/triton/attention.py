"""Paged attention for decode and prefill alike: tiles of queries over keys and values that lie in blocks.

1. A tile is some new tokens of one sequence with all query heads that share a KV head: rows, token by token.
2. A task is a tile and a range of its keys (kernels/triton/tasks.py). `_attend` takes tasks until none is left; it
   reads on the device how many there are, so a captured graph serves whatever its batch has become (split keys: Dao
   et al., Flash-Decoding, 2023; a list of tasks instead of a grid: Ye et al., FlashInfer, 2025).
3. A tile that is one task goes to `out`; what several tasks found of one `_merge` puts together.

Keys are taken in tiles from position 0 and in splits that begin at multiples of a length; what a row does not see adds
exact zeros, and what could be contracted into one rounding or two is written as one. So a row's bits depend on its own
position and the length of splits alone, however its tile was cut into tasks.
"""

# Triton's language is Python to its parser, not to its types.
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.backend import Heads
from kernels.triton.product import precision_for, product

_NO_WINDOW = 2**30
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Tiling:
    """How `_attend` is compiled. rows: of a query tile; keys: of a key tile; split: keys after which a task begins
    anew and joins what it found (0: never)."""

    rows: int
    keys: int
    split: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Tasks:
    """Tensors of int32 on the device. tasks, merges: [most, tasks.FIELDS]; counts: [2], how many there are; tables:
    block ids, one sequence after the other."""

    tasks: torch.Tensor
    merges: torch.Tensor
    counts: torch.Tensor
    tables: torch.Tensor


@dataclass(frozen=True, slots=True)
class Parts:
    """Room for what tasks find in a part of their tile's keys. float32.

    sums: [most, num_kv_heads, rows, dim]; marks: [most, num_kv_heads, 2, rows]: of each row the greatest score, in
    powers of two, and the sum of weights. rows: as many as the largest tile has that is cut"""

    sums: torch.Tensor
    marks: torch.Tensor


@triton.jit
def _join(top, total, sums, later_top, later_total, later_sums):
    """Softmax's state over some keys and that over later ones -> over both. top is -inf where no key was seen."""
    new_top = tl.maximum(top, later_top)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    old, new = tl.exp2(top - base), tl.exp2(later_top - base)
    total = tl.fma(total, old, later_total * new)
    sums = tl.fma(sums, old[:, None], later_sums * new[:, None])
    return new_top, total, sums


@triton.jit
def _see(
    queries, top, total, sums, keys, values, table, first, stop, position, at, window, scale, block_stride, dim,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
    WINDOWED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state after KEYS keys from `first`. at: [rows] positions from `position` on. Unmasked: all rows see all."""
    key = first + tl.arange(0, KEYS)
    if MASKED:
        there = key < stop
        if WINDOWED:
            there &= key > position - window  # blocks before may have gone to others
        block = tl.load(table + key // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
    else:
        block = tl.load(table + key // BLOCK_SIZE).to(tl.int64)
    place = block * block_stride + (key % BLOCK_SIZE) * HEAD_DIM
    k_place, v_place = keys + place[None, :] + dim[:, None], values + place[:, None] + dim[None, :]
    if MASKED:
        in_dim = dim < HEAD_DIM
        k = tl.load(k_place, mask=there[None, :] & in_dim[:, None], other=0.0)  # [DIM, KEYS]
        v = tl.load(v_place, mask=there[:, None] & in_dim[None, :], other=0.0)  # 0 * NaN would be NaN
    elif DIM != HEAD_DIM:
        in_dim = dim < HEAD_DIM
        k = tl.load(k_place, mask=in_dim[:, None], other=0.0)
        v = tl.load(v_place, mask=in_dim[None, :], other=0.0)
    else:
        k = tl.load(k_place)
        v = tl.load(v_place)
    scores = product(queries, k, tl.zeros((queries.shape[0], KEYS), tl.float32), PRECISION)
    if MASKED:
        seen = key[None, :] <= at[:, None]
        if WINDOWED:
            seen &= key[None, :] > at[:, None] - window
        scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    base = new_top
    if MASKED:
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(tl.fma(scores, scale, -base[:, None]))
    old = tl.exp2(top - base)
    total = tl.fma(total, old, tl.sum(weights, 1))
    sums = product(weights.to(v.dtype), v, sums * old[:, None], PRECISION)
    return new_top, total, sums


@triton.jit
def _see_range(
    queries, keys, values, table, first, stop, position, num_tokens, at, window, scale, block_stride, dim,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WINDOWED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state over keys first to stop; first is a multiple of KEYS. Masks only where some row does not see all."""
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, DIM), tl.float32)
    whole = first
    if WINDOWED:
        seen_by_all = position + num_tokens - window  # from here on, until position
        whole = tl.minimum(tl.maximum(first, tl.cdiv(seen_by_all, KEYS) * KEYS), tl.cdiv(stop, KEYS) * KEYS)
        for key in range(first, whole, KEYS):
            top, total, sums = _see(
                queries, top, total, sums, keys, values, table, key, stop, position, at, window, scale, block_stride,
                dim, HEAD_DIM, DIM, BLOCK_SIZE, KEYS, True, WINDOWED, PRECISION,
            )  # fmt: skip
    edge = tl.maximum(whole, tl.minimum(stop, position + 1) // KEYS * KEYS)
    for key in range(whole, edge, KEYS):
        top, total, sums = _see(
            queries, top, total, sums, keys, values, table, key, stop, position, at, window, scale, block_stride,
            dim, HEAD_DIM, DIM, BLOCK_SIZE, KEYS, False, WINDOWED, PRECISION,
        )  # fmt: skip
    for key in range(edge, stop, KEYS):
        top, total, sums = _see(
            queries, top, total, sums, keys, values, table, key, stop, position, at, window, scale, block_stride,
            dim, HEAD_DIM, DIM, BLOCK_SIZE, KEYS, True, WINDOWED, PRECISION,
        )  # fmt: skip
    return top, total, sums


@triton.jit(do_not_specialize=["part_rows"])
def _attend(
    q, k_cache, v_cache, out, part_sums, part_marks, tasks, counts, tables, q_stride, block_stride, head_stride,
    part_rows, window, scale,
    GROUPS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr, FIELDS: tl.constexpr,
    WINDOWED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # q: [tokens, q_stride]; out: [tokens, heads * HEAD_DIM]; caches: [blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]
    kv_head = tl.program_id(1)
    row = tl.arange(0, ROWS)
    token, head = row // GROUPS, kv_head * GROUPS + row % GROUPS
    dim = tl.arange(0, DIM)
    keys, values = k_cache + kv_head * head_stride, v_cache + kv_head * head_stride
    for number in range(tl.program_id(0), tl.load(counts), tl.num_programs(0)):
        task = tasks + number * FIELDS
        first_row, num_tokens, position = tl.load(task).to(tl.int64), tl.load(task + 1), tl.load(task + 2)
        first, stop = tl.load(task + 3), tl.load(task + 4)
        table, part = tables + tl.load(task + 5), tl.load(task + 6).to(tl.int64)
        at = position + token
        is_query = (token < num_tokens)[:, None] & (dim < HEAD_DIM)[None, :]
        q_place = q + (first_row + token[:, None]) * q_stride + head[:, None] * HEAD_DIM + dim[None, :]
        queries = tl.load(q_place, mask=is_query, other=0.0)
        if SPLIT == 0:
            top, total, sums = _see_range(
                queries, keys, values, table, first, stop, position, num_tokens, at, window, scale, block_stride, dim,
                HEAD_DIM, DIM, BLOCK_SIZE, ROWS, KEYS, WINDOWED, PRECISION,
            )  # fmt: skip
        else:
            top = tl.full((ROWS,), float("-inf"), tl.float32)
            total = tl.zeros((ROWS,), tl.float32)
            sums = tl.zeros((ROWS, DIM), tl.float32)
            for begin in range(first // SPLIT * SPLIT, stop, SPLIT):
                split_top, split_total, split_sums = _see_range(
                    queries, keys, values, table, tl.maximum(begin, first), tl.minimum(begin + SPLIT, stop), position,
                    num_tokens, at, window, scale, block_stride, dim,
                    HEAD_DIM, DIM, BLOCK_SIZE, ROWS, KEYS, WINDOWED, PRECISION,
                )  # fmt: skip
                top, total, sums = _join(top, total, sums, split_top, split_total, split_sums)
        if part < 0:
            out_place = out + (first_row + token[:, None]) * (NUM_KV_HEADS * GROUPS * HEAD_DIM)
            found = sums / tl.where(total == 0, 1.0, total)[:, None]  # rows beyond the tile's have seen nothing
            tl.store(out_place + head[:, None] * HEAD_DIM + dim[None, :], found.to(out.dtype.element_ty), mask=is_query)
        else:
            slot = part * NUM_KV_HEADS + kv_head
            marks = part_marks + slot * 2 * part_rows + row
            tl.store(marks, top, mask=token < num_tokens)
            tl.store(marks + part_rows, total, mask=token < num_tokens)
            sums_place = part_sums + (slot * part_rows + row[:, None]) * DIM + dim[None, :]
            tl.store(sums_place, sums, mask=is_query)


@triton.jit(do_not_specialize=["part_rows"])
def _merge(
    out, part_sums, part_marks, merges, counts, part_rows,
    GROUPS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    # one token and one head: parts in order of their keys
    head = tl.program_id(1)
    one = tl.arange(0, 1)
    dim = tl.arange(0, DIM)
    for number in range(tl.program_id(0), tl.load(counts + 1), tl.num_programs(0)):
        merge = merges + number * FIELDS
        token_row, token = tl.load(merge).to(tl.int64), tl.load(merge + 1)
        first, stop = tl.load(merge + 2).to(tl.int64), tl.load(merge + 3).to(tl.int64)
        row = token * GROUPS + head % GROUPS
        top = tl.full((1,), float("-inf"), tl.float32)
        total = tl.zeros((1,), tl.float32)
        sums = tl.zeros((1, DIM), tl.float32)
        for part in range(first, stop):
            slot = part * NUM_KV_HEADS + head // GROUPS
            marks = part_marks + slot * 2 * part_rows + row + one
            later = tl.load(
                part_sums + (slot * part_rows + row) * DIM + one[:, None] + dim[None, :],
                mask=(dim < HEAD_DIM)[None, :] & (one >= 0)[:, None], other=0.0,
            )  # fmt: skip
            top, total, sums = _join(top, total, sums, tl.load(marks), tl.load(marks + part_rows), later)
        place = out + token_row * (NUM_KV_HEADS * GROUPS * HEAD_DIM) + head * HEAD_DIM + one[:, None] + dim[None, :]
        found = sums / total[:, None]
        tl.store(place, found.to(out.dtype.element_ty), mask=(dim < HEAD_DIM)[None, :] & (one >= 0)[:, None])


def padded_dim(head_dim: int) -> int:
    """The least that a product on tensor cores takes."""
    return max(16, triton.next_power_of_2(head_dim))


def attend(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, out: torch.Tensor, work: Tasks, parts: Parts,
    heads: Heads, window: int | None, tiling: Tiling, num_programs: int,
) -> None:  # fmt: skip
    """q: [rows, at least num_heads * head_dim], of which the first columns are read; caches: [num_blocks,
    num_kv_heads, block_size, head_dim]; out: [rows, num_heads * head_dim]. num_programs: of each head, as many as the
    device can run at once."""
    block_size, groups = k_cache.shape[2], heads.num_heads // heads.num_kv_heads
    shape = {
        "GROUPS": groups, "NUM_KV_HEADS": heads.num_kv_heads, "HEAD_DIM": heads.head_dim,
        "DIM": padded_dim(heads.head_dim), "FIELDS": work.tasks.shape[1],
    }  # fmt: skip
    part_rows = parts.marks.shape[3]
    _attend[num_programs, heads.num_kv_heads](
        q, k_cache, v_cache, out, parts.sums, parts.marks, work.tasks, work.counts, work.tables, q.stride(0),
        k_cache.stride(0), k_cache.stride(1), part_rows, _NO_WINDOW if window is None else window,
        heads.scale * _LOG2_E, **shape, BLOCK_SIZE=block_size, ROWS=tiling.rows, KEYS=tiling.keys, SPLIT=tiling.split,
        WINDOWED=window is not None, PRECISION=precision_for(q), num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )  # fmt: skip
    if len(work.merges):
        _merge[num_programs, heads.num_heads](
            out, parts.sums, parts.marks, work.merges, work.counts, part_rows, **shape, num_warps=1
        )  # fmt: skip
