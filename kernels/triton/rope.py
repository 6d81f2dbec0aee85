"""Norm and turn q and k of new tokens, and store k and v into their blocks: one launch a layer.

A program takes _HEADS heads of one token. Its rounding is the reference's: after the norm, and after the turn.
"""

# Triton's language is Python to its parser, not to its types.
# pyright: reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.backend import Heads, Norms

_HEADS = 8


@triton.jit
def _weights(q_norm, k_norm, at, inside, is_q):
    """Of each head, [HEADS, HALF] float32: q's or k's."""
    of_q = tl.load(q_norm + at, mask=inside, other=0.0).to(tl.float32)
    of_k = tl.load(k_norm + at, mask=inside, other=0.0).to(tl.float32)
    return tl.where(is_q, of_q[None, :], of_k[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def _turn_and_store(
    qkv, q_norm, k_norm, k_cache, v_cache, positions, block_ids, offsets, cos, sin, head_dim, eps,
    block_stride, head_stride, num_tokens,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HAS_NORMS: tl.constexpr, WIDE: tl.constexpr,
    HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    # qkv: [rows, (NUM_HEADS + 2 * NUM_KV_HEADS) * head_dim]; caches: [blocks, NUM_KV_HEADS, block_size, head_dim]
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    half = head_dim // 2
    at = tl.arange(0, HALF)
    in_half = at < half
    inside = (head < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & in_half[None, :]
    place = qkv + (token * (NUM_HEADS + 2 * NUM_KV_HEADS) + head[:, None]) * head_dim + at[None, :]
    raw_first = tl.load(place, mask=inside, other=0.0)
    raw_second = tl.load(place + half, mask=inside, other=0.0)
    kind = raw_first.dtype
    first, second = raw_first.to(tl.float32), raw_second.to(tl.float32)
    if HAS_NORMS:
        scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / head_dim + eps)[:, None]
        first, second = first * scale, second * scale
        if not WIDE:
            first, second = first.to(kind).to(tl.float32), second.to(kind).to(tl.float32)
        is_q = (head < NUM_HEADS)[:, None]
        first = (first * _weights(q_norm, k_norm, at, in_half, is_q)).to(kind).to(tl.float32)
        second = (second * _weights(q_norm + half, k_norm + half, at, in_half, is_q)).to(kind).to(tl.float32)
    angle = tl.load(positions + token).to(tl.int64) * half + at
    cosine = tl.load(cos + angle, mask=in_half, other=0.0)[None, :]
    sine = tl.load(sin + angle, mask=in_half, other=0.0)[None, :]
    turned_first = (first * cosine - second * sine).to(kind)
    turned_second = (second * cosine + first * sine).to(kind)
    is_query = inside & (head < NUM_HEADS)[:, None]
    tl.store(place, turned_first, mask=is_query)
    tl.store(place + half, turned_second, mask=is_query)
    block = tl.load(block_ids + token, mask=token < num_tokens, other=-1).to(tl.int64)
    if block >= 0:
        slot = block * block_stride + tl.load(offsets + token).to(tl.int64) * head_dim
        is_key = inside & ((head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS))[:, None]
        key = k_cache + slot + (head - NUM_HEADS)[:, None] * head_stride + at[None, :]
        tl.store(key, turned_first, mask=is_key)
        tl.store(key + half, turned_second, mask=is_key)
        is_value = inside & (head >= NUM_HEADS + NUM_KV_HEADS)[:, None]
        value = v_cache + slot + (head - NUM_HEADS - NUM_KV_HEADS)[:, None] * head_stride + at[None, :]
        tl.store(value, raw_first, mask=is_value)
        tl.store(value + half, raw_second, mask=is_value)


def turn_and_store(
    qkv: torch.Tensor, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, k_cache: torch.Tensor,
    v_cache: torch.Tensor, positions: torch.Tensor, block_ids: torch.Tensor, offsets: torch.Tensor,
    cos: torch.Tensor, sin: torch.Tensor, heads: Heads, norms: Norms,
) -> None:  # fmt: skip
    """qkv: [rows, heads.width], whose q is overwritten with what it is turned to; block_ids, offsets: [tokens], of the
    first rows: -1 stores nothing; cos, sin: [max_context, head_dim / 2]. The caches as Attention.attend has them."""
    num_rows = len(qkv)
    if not num_rows:
        return
    grid = (num_rows, triton.cdiv(heads.num_heads + 2 * heads.num_kv_heads, _HEADS))
    has_norms = q_norm is not None and k_norm is not None
    _turn_and_store[grid](
        qkv, q_norm if has_norms else qkv, k_norm if has_norms else qkv, k_cache, v_cache, positions, block_ids,
        offsets, cos, sin, heads.head_dim, norms.eps, k_cache.stride(0), k_cache.stride(1), len(block_ids),
        NUM_HEADS=heads.num_heads, NUM_KV_HEADS=heads.num_kv_heads, HAS_NORMS=has_norms, WIDE=norms.wide,
        HALF=triton.next_power_of_2(heads.head_dim // 2), HEADS=_HEADS, num_warps=4,
    )  # fmt: skip
