"""Norms, gates, rotary turns, stores and products in Triton against their reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kernels.backend import Gate, Heads, Norms
from kernels.reference.layers import GATES, apply_rope, rms_norm, store_kv
from tests.kernels.interpreted import EACH_DEVICE, TYPES, random

from kernels.triton.layers import add_rms_norm, gate_and_mul  # isort: skip
from kernels.triton.linear import multiply  # isort: skip
from kernels.triton.rope import turn_and_store  # isort: skip

NAN = float("nan")
# The interpreter cuts a float32 off where a device rounds it to bfloat16.
CLOSE: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}


@EACH_DEVICE
@TYPES
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 36), (2, 2048), (1, 3000)], ids=str)
@pytest.mark.parametrize("weight_dtype", [None, torch.float32], ids=["its own", "float32"])
def test_a_norm_is_of_the_sum_that_it_leaves(
    shape: tuple[int, int], wide: bool, dtype: torch.dtype, weight_dtype: torch.dtype | None, device: str
) -> None:
    hidden, added = random(*shape, dtype=dtype, device=device), random(*shape, dtype=dtype, device=device, seed=1)
    weight = random(shape[1], dtype=weight_dtype or dtype, device=device, seed=2)
    whole = hidden + added
    wanted = rms_norm(whole, weight, 1e-5, wide).to(dtype)
    got = add_rms_norm(hidden, added, weight, Norms(1e-5, wide))
    torch.testing.assert_close(hidden, whole, **CLOSE[dtype])
    torch.testing.assert_close(got, wanted, **CLOSE[dtype])
    left = hidden.clone()
    torch.testing.assert_close(add_rms_norm(hidden, None, weight, Norms(1e-5, wide)), wanted, **CLOSE[dtype])
    assert torch.equal(hidden, left), "there was nothing to add"


@EACH_DEVICE
@TYPES
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # to infinity, as it should
@pytest.mark.parametrize("gate", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (2, 1030)], ids=str)
def test_a_gate_is_that_of_the_reference(
    gate: Gate, shape: tuple[int, int], dtype: torch.dtype, device: str
) -> None:  # fmt: skip
    x = random(shape[0], 2 * shape[1], dtype=dtype, device=device) * 4
    torch.testing.assert_close(gate_and_mul(x, gate), GATES[gate](x), **CLOSE[dtype])


@EACH_DEVICE
@TYPES
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("heads", "block_size"), [((4, 2, 8), 4), ((9, 3, 64), 16), ((3, 1, 12), 5)], ids=str)
def test_heads_are_normed_turned_and_stored(
    heads: tuple[int, int, int], block_size: int, has_norms: bool, wide: bool, dtype: torch.dtype, device: str
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    shape, norms = Heads(*heads, scale=1.0), Norms(1e-6, wide)
    rows, tokens = 5, 4
    qkv = random(rows, shape.width, dtype=dtype, device=device)
    weights = [random(head_dim, dtype=dtype, device=device, seed=seed) + 1 for seed in (1, 2)]
    cos, sin = (random(50, head_dim // 2, device=device, seed=seed) for seed in (3, 4))
    positions = torch.tensor([7, 0, 49, 7, 1], device=device)
    blocks, offsets = torch.tensor([2, 0, -1, 5], device=device), torch.arange(tokens, device=device) % block_size
    caches = [torch.full((6, num_kv_heads, block_size, head_dim), NAN, dtype=dtype, device=device) for _ in "kv"]
    wanted = [cache.clone() for cache in caches]
    q, k, v = qkv.view(rows, -1, head_dim).split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if has_norms:
        q, k = (rms_norm(part, weight, 1e-6, wide) for part, weight in zip((q, k), weights, strict=True))
    q, k = (apply_rope(part, cos[positions][:, None], sin[positions][:, None]) for part in (q, k))
    stored = blocks >= 0
    for cache, part in zip(wanted, (k, v), strict=True):
        store_kv(cache, part[:tokens][stored], blocks[stored], offsets[stored])
    v = v.clone()

    q_norm, k_norm = weights if has_norms else (None, None)
    turn_and_store(qkv, q_norm, k_norm, caches[0], caches[1], positions, blocks, offsets, cos, sin, shape, norms)
    got = qkv.view(rows, -1, head_dim)
    torch.testing.assert_close(got[:, :num_heads], q, **CLOSE[dtype])
    for cache, own in zip(caches, wanted, strict=True):
        torch.testing.assert_close(cache, own, **CLOSE[dtype], equal_nan=True)
    assert torch.equal(got[:, num_heads + num_kv_heads :], v)


PRODUCTS = [(1, 16, 64), (3, 70, 36), (65, 64, 128), (130, 65, 48)]


@EACH_DEVICE
@TYPES
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_a_product_is_the_product(
    shape: tuple[int, int, int], has_bias: bool, dtype: torch.dtype, device: str
) -> None:  # fmt: skip
    rows, columns, num_k = shape
    x, weight = random(rows, num_k, dtype=dtype, device=device), random(columns, num_k, dtype=dtype, device=device)
    bias = random(columns, dtype=dtype, device=device, seed=5) if has_bias else None
    wanted = F.linear(x.double(), weight.double() / 8, None if bias is None else bias.double())
    torch.testing.assert_close(multiply(x, weight / 8, bias).double(), wanted, **CLOSE[dtype])


@EACH_DEVICE
@TYPES
def test_a_row_of_a_product_has_its_bits_in_any_batch(dtype: torch.dtype, device: str) -> None:
    x, weight = random(150, 96, dtype=dtype, device=device), random(70, 96, dtype=dtype, device=device, seed=1)
    whole = multiply(x, weight, None)
    for rows in (slice(0, 1), slice(3, 20), slice(63, 64), slice(40, 150)):
        assert torch.equal(multiply(x[rows].contiguous(), weight, None), whole[rows])


@EACH_DEVICE
def test_no_rows_are_no_launch(device: str) -> None:
    none = torch.empty(0, 16, device=device)
    assert add_rms_norm(none, None, torch.ones(16, device=device), Norms(1e-5, False)).shape == (0, 16)
    assert gate_and_mul(none, "silu").shape == (0, 8)
    assert multiply(none, torch.ones(5, 16, device=device), None).shape == (0, 5)
