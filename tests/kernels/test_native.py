"""The C++ library against exact sums, against the reference, and bit for bit against itself."""

from __future__ import annotations

import logging
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.backend import Attention, Backend, Call, DenseLayer, Gate, GroupCalls, GroupPlace, Heads, Linear
from kernels.cpu.native import library as native_library
from kernels.cpu.native.linear import TILED_ROWS
from kernels.cpu.native.stack import NativeStack
from kernels.cpu.packed import can_pack
from kernels.reference.layers import GATES, apply_rope, rms_norm, store_kv
from kernels.reference.quantized import Bits, quantize
from tests.kernels.native import DTYPES, NORMS, attend, native, random, reference
from tests.kernels.test_attention import CASES, NAN, Case, make_case, softmax_attention

pytestmark = pytest.mark.usefixtures("each_vectors")

ROWS = (1, 2, 3, 5, 6, 7, 12, 13, 25, 64, 200)
TYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)
WEIGHTS = pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.float32, 16), (torch.bfloat16, 16), (torch.bfloat16, 8), (torch.bfloat16, 4)]
)


def tolerance(dtype: torch.dtype) -> dict[str, Any]:
    return {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}


def kept(weight: torch.Tensor, bits: Bits) -> torch.Tensor:
    """What so many bits keep of a weight."""
    quantized = quantize(weight, bits)
    return (weight.float() if quantized is None else quantized.restored()).double()


@WEIGHTS
@pytest.mark.parametrize("gate", [None, "silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(2, 2), (32, 64), (70, 64), (96, 34), (160, 128)], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_linear_layer_is_the_product(
    dtype: torch.dtype, bits: Bits, gate: Gate | None, shape: tuple[int, int], has_bias: bool
) -> None:
    weight, bias = random(*shape, dtype=dtype) / 8, random(shape[0], dtype=dtype, seed=1)
    layer = native(dtype).linear(weight, bias if has_bias else None, gate, bits)
    for rows in (1, 30):
        x = random(rows, shape[1], dtype=dtype, seed=2)
        wanted = x.double() @ kept(weight, bits).T + (bias.double() if has_bias else 0)
        if gate is not None:
            wanted = GATES[gate](wanted.float()).double()
        got = layer(x)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), wanted, **tolerance(dtype))


@WEIGHTS
@pytest.mark.parametrize("num_k", [64, 576])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_rows_bits_do_not_depend_on_the_others_nor_on_the_threads(
    dtype: torch.dtype, bits: Bits, num_k: int, has_bias: bool
) -> None:
    weight = random(200, num_k, dtype=dtype) / 8
    bias = random(200, dtype=dtype, seed=2) if has_bias else None
    x = random(max(ROWS), num_k, dtype=dtype, seed=1)
    wanted = native(dtype).linear(weight, bias, "silu", bits)(x)
    for num_threads in (1, 2, 3):
        layer = native(dtype, num_threads).linear(weight, bias, "silu", bits)
        for rows in ROWS:
            assert torch.equal(layer(x[-rows:].contiguous()), wanted[-rows:]), (num_threads, rows)
    native(dtype)


@pytest.mark.skipif(not can_pack(torch.bfloat16), reason="oneDNN has no product of bfloat16 for this processor")
def test_where_many_rows_go_to_onednn_they_are_right_too() -> None:
    weight, bias = random(96, 64, dtype=torch.bfloat16) / 8, random(96, dtype=torch.bfloat16, seed=1)
    x = random(TILED_ROWS, 64, dtype=torch.bfloat16, seed=2)
    plain, tiled = (native(torch.bfloat16, is_tiled=tiled).linear(weight, bias, "silu") for tiled in (False, True))
    assert tiled.tiled is not None
    torch.testing.assert_close(tiled(x), plain(x), **tolerance(torch.bfloat16))
    assert torch.equal(tiled(x[1:]), plain(x[1:]))


@TYPES
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("width", [8, 48, 576])
def test_norms_are_the_references(dtype: torch.dtype, wide: bool, width: int) -> None:
    norms = type(NORMS)(1e-5, wide)
    hidden, added = (random(40, width, dtype=dtype, seed=seed) for seed in range(2))
    weight = random(width, dtype=dtype, seed=2)
    for extra in (None, added):
        wanted = reference(dtype).add_norm(hidden.clone(), extra, weight, norms)
        backend = native(dtype)
        got = backend.add_norm(hidden.clone(), extra, backend.norm_weight(weight), norms)
        assert torch.equal(got[0], wanted[0])
        # the sum of squares is added in another order: the last digit may differ
        close: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-6}
        torch.testing.assert_close(got[1], wanted[1], **close)


@TYPES
@pytest.mark.parametrize("head_dim", [2, 8, 34, 64, 80])
@pytest.mark.parametrize("has_norms", [False, True])
def test_keys_are_turned_and_stored_as_the_reference_does(dtype: torch.dtype, head_dim: int, has_norms: bool) -> None:
    heads, block_size, num_rows = Heads(4, 2, head_dim, 1.0), 4, 9
    qkv = random(num_rows, heads.width, dtype=dtype)
    angles = random(64, head_dim // 2, seed=1)
    positions = torch.tensor([0, 1, 2, 3, 4, 5, 17, 30, 63])
    block_ids, offsets = torch.tensor([5, 5, 5, 5, 0, 0, 3, 2, 7]), positions % block_size
    q_norm, k_norm = (random(head_dim, dtype=dtype, seed=seed) if has_norms else None for seed in (2, 3))
    wanted = [torch.full((9, 2, block_size, head_dim), NAN, dtype=dtype) for _ in range(2)]
    got = [cache.clone() for cache in wanted]
    _, keys, values = qkv.view(num_rows, -1, head_dim).split((4, 2, 2), dim=1)
    if k_norm is not None:
        keys = rms_norm(keys, k_norm, NORMS.eps)
    turned = apply_rope(keys, angles.cos()[positions][:, None], angles.sin()[positions][:, None])
    for cache, new in zip(wanted, (turned, values), strict=True):
        store_kv(cache, new, block_ids, offsets)

    backend = native(dtype)
    attention = backend.attention(heads, NORMS)
    (plan,) = attention.plan([GroupCalls((), None)], block_size)
    place = GroupPlace(block_ids, offsets, attention.turns(angles.cos(), angles.sin(), positions), plan)
    q_norm, k_norm = (None if norm is None else backend.norm_weight(norm) for norm in (q_norm, k_norm))
    attention.attend(qkv, q_norm, k_norm, got[0], got[1], place)
    close: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True, **close)


@TYPES
@pytest.mark.parametrize("block_size", [1, 4, 16, 48])
@pytest.mark.parametrize(("lengths", "num_new"), CASES.values(), ids=CASES)
def test_attention_is_an_explicit_softmax(
    lengths: list[int], num_new: int, block_size: int, dtype: torch.dtype
) -> None:
    case = make_case(lengths, num_new, block_size=block_size, dtype=dtype)
    out = attend(native(dtype), case)
    for index in range(len(lengths)):
        torch.testing.assert_close(out[index].double(), softmax_attention(case, index), **tolerance(dtype))


@TYPES
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (4, 4), (6, 2), (9, 3), (5, 1)])
@pytest.mark.parametrize("head_dim", [2, 8, 34, 64, 96])
def test_attention_of_any_heads(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    case = make_case([60, 131], 7, num_heads, num_kv_heads, head_dim, dtype=dtype)
    out = attend(native(dtype), case)
    for index in range(2):
        torch.testing.assert_close(out[index].double(), softmax_attention(case, index), **tolerance(dtype))


@TYPES
@pytest.mark.parametrize("window", [1, 5, 64, 100, 129])
@pytest.mark.parametrize("block_size", [4, 48])
def test_attention_with_a_window_is_the_references(dtype: torch.dtype, window: int, block_size: int) -> None:
    for lengths, num_new in (([300, 20, 1], 1), ([400], 90), ([130], 130)):
        case = make_case(lengths, num_new, block_size=block_size, dtype=dtype)
        wanted = attend(reference(dtype), case, window)
        torch.testing.assert_close(attend(native(dtype), case, window), wanted, **tolerance(dtype))


def test_large_scores_stay_finite_and_right() -> None:
    case = make_case([140, 9], 4, scale=60.0)
    out = attend(native(torch.float32), case)
    for index in range(2):
        torch.testing.assert_close(out[index].double(), softmax_attention(case, index), rtol=2e-3, atol=2e-3)


@TYPES
@pytest.mark.parametrize("window", [None, 70])
def test_a_query_has_the_same_bits_in_any_chunk_beside_any_others_on_any_threads(
    dtype: torch.dtype, window: int | None
) -> None:
    whole = make_case([300], 300, num_heads=9, num_kv_heads=3, head_dim=64, dtype=dtype)
    wanted = attend(native(dtype), whole, window)[0]
    for num_threads, num_new in ((1, 1), (2, 1), (1, 33), (2, 299)):
        last = type(whole)(
            [whole.queries[0][-num_new:]], whole.keys, whole.values, whole.k_cache, whole.v_cache, whole.blocks
        )
        assert torch.equal(attend(native(dtype, num_threads), last, window)[0], wanted[-num_new:])
    many = make_case([5, 140, 129, 17, 250], 1, dtype=dtype)
    together = attend(native(dtype, 2), many, window)
    for index in range(5):
        alone = attend(native(dtype), many, window, slice(index, index + 1))
        assert torch.equal(alone[0], together[index])


@TYPES
def test_what_lies_in_unused_slots_changes_no_bit(dtype: torch.dtype) -> None:
    case = make_case([20, 150], 3, dtype=dtype)
    wanted = attend(native(dtype), case)
    for rubbish in (0.0, 1e30, float("inf"), float("-inf")):
        for cache in (case.k_cache, case.v_cache):
            cache[cache.isnan()] = rubbish
        assert torch.equal(attend(native(dtype), case), wanted)
        for cache in (case.k_cache, case.v_cache):
            cache[cache == torch.tensor(rubbish).to(dtype)] = NAN


def test_threads_may_change_in_number_while_engines_compute_side_by_side() -> None:
    backend = native(torch.float32, 2)
    layer, x = backend.linear(random(400, 64), None), random(40, 64, seed=1)
    wanted, wrong = layer(x), list[int]()

    def compute(seed: int) -> None:
        for number in range(400):
            if not torch.equal(layer(x), wanted):
                wrong.append(number)
            if number % 7 == seed:
                backend.library.set_threads(1 + (number + seed) % 4)

    threads = [threading.Thread(target=compute, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    native(torch.float32)
    assert not wrong


@TYPES
def test_nan_in_a_slot_that_is_seen_shows(dtype: torch.dtype) -> None:
    """Else tests that poison what must not be read would prove nothing."""
    for plane in ("k_cache", "v_cache"):
        case = make_case([150], 3, dtype=dtype)
        getattr(case, plane)[case.blocks[0, 2], :, 1] = NAN
        assert attend(native(dtype), case).isnan().all()


@TYPES
@pytest.mark.parametrize("has_sandwich", [False, True])
def test_all_layers_in_one_call_give_the_bits_of_their_parts(dtype: torch.dtype, has_sandwich: bool) -> None:
    backend, heads, width, inner = native(dtype, 2), Heads(4, 2, 8, 0.3), 32, 48
    layers = [_layer(backend, heads, width, inner, has_sandwich, dtype, 20 * index) for index in range(3)]
    attention, stack = backend.attention(heads, NORMS), backend.stack(layers, heads, NORMS)
    assert stack.takes(10_000)
    case = make_case([90, 40], 6, heads.num_heads, heads.num_kv_heads, heads.head_dim, 4, dtype)
    places, rows = [(0, 0), (0, 1), (0, 2)], 12
    found = []
    for is_whole in (False, True):
        k, v = (cache.repeat(3, 1, 1, 1, 1) for cache in (case.k_cache, case.v_cache))
        group = _group(attention, case, heads)
        hidden, told = random(rows, width, dtype=dtype, seed=9), list[int]()
        if is_whole:
            for stored in (None, told.append):
                own, added = stack(hidden.clone(), k, v, places, [group], stored)
                found.append(own + added)
        else:
            added = None
            for number, layer in enumerate(layers):
                hidden, x = backend.add_norm(hidden, added, layer.attention_norm, NORMS)
                attended = attention.attend(layer.qkv(x), layer.q_norm, layer.k_norm, k[number], v[number], group)
                attended = layer.out(attended)
                if layer.attention_out_norm is not None:
                    attended = backend.norm(attended, layer.attention_out_norm, NORMS)
                hidden, x = backend.add_norm(hidden, attended, layer.mlp_norm, NORMS)
                added = layer.down(layer.gate_up(x))
                if layer.mlp_out_norm is not None:
                    added = backend.norm(added, layer.mlp_out_norm, NORMS)
            assert added is not None
            found.append(hidden + added)
    assert told == [1, 2, 3]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    native(dtype)


def test_a_cache_of_another_shape_at_the_same_place_is_another_cache() -> None:
    """As when one is freed and the next is made: the layers' places in it are not where they were."""
    backend, heads = native(torch.float32), Heads(4, 2, 8, 0.3)
    layers = [_layer(backend, heads, 32, 48, False, torch.float32, 20 * index) for index in range(2)]
    attention, places = backend.attention(heads, NORMS), [(0, 0), (0, 1)]
    case = make_case([90, 40], 6, heads.num_heads, heads.num_kv_heads, heads.head_dim, 4)
    memory = [torch.empty(2, 3 * len(case.k_cache), *case.k_cache.shape[1:]) for _ in range(2)]

    def compute(num_blocks: int, used: list[NativeStack]) -> torch.Tensor:
        shape = (2, num_blocks, *case.k_cache.shape[1:])
        planes = [part.flatten()[: math.prod(shape)].view(shape).zero_() for part in memory]
        for plane, cache in zip(planes, (case.k_cache, case.v_cache), strict=True):
            plane[:, : len(cache)] = cache
        hidden = random(12, 32, seed=9)
        stack = used[0] if used else backend.stack(layers, heads, NORMS)
        own, added = stack(hidden, planes[0], planes[1], places, [_group(attention, case, heads)], None)
        return own + added

    one = [backend.stack(layers, heads, NORMS)]
    for num_blocks in (len(case.k_cache), 3 * len(case.k_cache), len(case.k_cache)):
        assert torch.equal(compute(num_blocks, one), compute(num_blocks, []))


def test_without_a_compiler_or_a_processor_for_it_torch_computes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value, told in (
        ("_COMPILERS", ("no-such-compiler",), "no C++ compiler"),
        ("_NEEDED", ("avx4096",), "this processor has no avx4096"),
    ):
        with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
            patched.setattr(native_library, name, value)
            native_library.load_library.cache_clear()
            assert native_library.load_library() is None
        assert told in caplog.text
    native_library.load_library.cache_clear()


def test_code_that_does_not_compile_is_told_with_what_the_compiler_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    native(torch.float32)  # skips where there is no compiler
    for name in native_library._PARTS:
        (tmp_path / name).write_text("int broken(")
    monkeypatch.setattr(native_library, "_SOURCES", tmp_path)
    with pytest.raises(OSError, match=r"failed: .*\.cpp"):
        native_library._compiled(tmp_path / "made")
    assert not list((tmp_path / "made").glob("*.so"))


def _layer(
    backend: Backend, heads: Heads, width: int, inner: int, has_sandwich: bool, dtype: torch.dtype, seed: int
) -> DenseLayer:  # fmt: skip
    def linear(rows: int, columns: int, at: int, gate: Gate | None = None) -> Linear:
        return backend.linear(random(rows, columns, dtype=dtype, seed=seed + at) / 8, None, gate)

    def norm(size: int, at: int) -> torch.Tensor:
        return backend.norm_weight(1 + random(size, dtype=dtype, seed=seed + at) / 8)

    sandwich = [norm(width, at) if has_sandwich else None for at in (7, 8)]
    own = [norm(heads.head_dim, at) if has_sandwich else None for at in (9, 10)]
    return DenseLayer(
        norm(width, 1), linear(heads.width, width, 2), own[0], own[1],
        linear(width, heads.num_heads * heads.head_dim, 3), sandwich[0], norm(width, 4),
        linear(2 * inner, width, 5, "silu"), linear(width, inner, 6), sandwich[1],
    )  # fmt: skip


def _group(attention: Attention, case: Case, heads: Heads) -> GroupPlace:
    num_new, block_size = len(case.queries[0]), case.k_cache.shape[2]
    starts = [length - num_new for length in case.lengths]
    positions = torch.cat([torch.arange(start, start + num_new) for start in starts])
    sequence = torch.arange(len(starts)).repeat_interleave(num_new)
    call = Call(slice(0, len(positions)), tuple(starts), num_new, case.blocks.numpy())
    (plan,) = attention.plan([GroupCalls((call,), None)], block_size)
    angles = random(512, heads.head_dim // 2, seed=3)
    return GroupPlace(
        case.blocks[sequence, positions // block_size].contiguous(), positions % block_size,
        attention.turns(angles.cos(), angles.sin(), positions), plan,
    )  # fmt: skip
