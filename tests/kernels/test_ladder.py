"""The row ladder: which row counts give equal bits on this machine, and what is done where they do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from kernels.cpu.attention import weigh
from kernels.cpu.packed import PackedMatrix, can_pack
from kernels.dispatch import prepare
from kernels.reference.attention import make_segment, paged_attention, weigh_by_tiles
from kernels.reference.attention import multiply as cut_product
from kernels.reference.ladder import (
    FREE,
    HIGH_SAMPLES,
    LOW_RUNGS,
    MAX_HIGH_COLUMNS,
    REFERENCE_ROWS,
    Ladders,
    RowLadder,
    Weigh,
    linear,
    measure_attention,
    measure_linear,
)
from kernels.reference.matrix import Matrix, PlainMatrix

HEAD_DIM, KV_TILE = 16, 128
SHAPES = ((96, 32), (32, 32), (160, 32), (32, 80))
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """As an engine by default; more only wait for each other on products this small."""
    torch.set_num_threads(1)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights(dtype: torch.dtype = torch.float32, form: Callable[[torch.Tensor], Matrix] = PlainMatrix) -> list[Matrix]:
    return [form(random(*shape, dtype=dtype, seed=seed)) for seed, shape in enumerate(SHAPES)]


def measure(dtype: torch.dtype = torch.float32, weigh: Weigh = weigh_by_tiles) -> Ladders:
    """Of plain weights."""
    return Ladders(
        measure_linear(weights(dtype)), measure_attention(HEAD_DIM, KV_TILE, torch.zeros(1, dtype=dtype), weigh)
    )


class Machine(TorchFunctionMode):
    """A machine whose products are wrong by a part `fault(rows)` of themselves, [rows], one for each row."""

    def __init__(self, fault: Callable[[int], torch.Tensor]) -> None:
        super().__init__()
        self.fault = fault

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.baddbmm_:
            return args[0].add_(self._spoil(torch.bmm(*args[1:])))
        out = func(*args, **(kwargs or {}))
        return self._spoil(out) if func in (F.linear, torch.bmm) else out

    def _spoil(self, product: torch.Tensor) -> torch.Tensor:
        return product + product * self.fault(product.shape[-2])[:, None].to(product.dtype)


class Reordered(TorchFunctionMode):
    """A machine that adds in the opposite order where there are at most four rows."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and len(args[0]) <= 4:
            args = (args[0].flip(1), args[1].flip(1), *args[2:])
        if func is torch.bmm and args[0].shape[1] <= 4:
            args = (args[0].flip(2), args[1].flip(1), *args[2:])
        return func(*args, **(kwargs or {}))


def by_count(rows: int) -> torch.Tensor:
    """No two row counts agree."""
    return torch.full((rows,), float(rows))


def by_place(rows: int) -> torch.Tensor:
    """A row's result depends on where it lies."""
    return torch.arange(rows).float()


def few_rows(rows: int) -> torch.Tensor:
    """Up to four rows are treated in another way, as matrix-vector code does."""
    return torch.full((rows,), float(rows <= 4))


def last_rows(rows: int) -> torch.Tensor:
    """What is left behind the last whole panel of 48 rows is treated in another way, where there is a panel."""
    places = torch.arange(rows)
    return ((places >= rows // 48 * 48) & torch.tensor(rows > REFERENCE_ROWS)).float()


# --- pad ------------------------------------------------------------------------------------------------------

LADDERS = [
    FREE, RowLadder((64,), high=False), RowLadder((4, 8, 16, 64), high=True), RowLadder((6, 20, 48, 64), high=False)
]  # fmt: skip


@pytest.mark.parametrize("ladder", LADDERS, ids=str)
def test_padding_is_the_least_usable_count_that_holds_the_rows(ladder: RowLadder) -> None:
    step = 16 if ladder.high else REFERENCE_ROWS
    usable = [*ladder.rungs, *range(REFERENCE_ROWS + step, 1000, step)]
    for rows in range(1, 700):
        assert ladder.pad(rows) == min(count for count in usable if count >= rows)


@pytest.mark.parametrize("ladder", LADDERS, ids=str)
def test_padding_rises_with_the_rows_and_leaves_padded_counts_alone(ladder: RowLadder) -> None:
    padded = [ladder.pad(rows) for rows in range(1, 700)]
    assert padded == sorted(padded)
    assert all(ladder.pad(count) == count for count in padded)


def test_without_invariance_small_batches_are_not_padded() -> None:
    assert all(FREE.pad(rows) == rows for rows in range(1, REFERENCE_ROWS + 1))


# --- this machine ---------------------------------------------------------------------------------------------


FORMS = pytest.mark.parametrize("form", [PlainMatrix, prepare], ids=["plain", "prepared"])


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_listed_rung_of_linear_layers_agrees_on_this_machine(
    dtype: torch.dtype, form: Callable[[torch.Tensor], Matrix]
) -> None:
    """With rows that lie anywhere."""
    ladder = measure_linear(weights(dtype, form))
    for weight in weights(dtype, form):
        check_rungs(
            ladder, random(53, weight.shape[1], dtype=dtype, seed=9), lambda x, w=weight: linear(x, w, None, ladder)
        )


@pytest.mark.parametrize(
    ("dtype", "weigh"), [(torch.float32, weigh), (torch.float32, weigh_by_tiles), (torch.bfloat16, weigh_by_tiles)]
)
def test_every_listed_rung_of_attention_agrees_on_this_machine(dtype: torch.dtype, weigh: Weigh) -> None:
    ladder = measure_attention(HEAD_DIM, KV_TILE, torch.zeros(1, dtype=dtype), weigh)
    keys, values = random(1, HEAD_DIM, 384, dtype=dtype), random(1, 384, HEAD_DIM, dtype=dtype)
    check_rungs(ladder, random(53, HEAD_DIM, dtype=dtype, seed=9), lambda x: cut_product(x[None], keys, ladder.tile)[0])
    check_rungs(ladder, random(53, 384, seed=9), lambda x: weigh(x[None].clone(), values, KV_TILE, ladder.tile)[0])


def check_rungs(ladder: RowLadder, rows: torch.Tensor, product: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert REFERENCE_ROWS in ladder.rungs
    wanted = product(rows[torch.arange(REFERENCE_ROWS) % 53])[:53]
    for count in (*ladder.rungs, *(HIGH_SAMPLES if ladder.high else (128, 192)), ladder.pad(300)):
        for shift in (0, 1, 17):
            places = (torch.arange(count) + shift) % 53
            assert torch.equal(product(rows[places]), wanted[places]), f"{count} rows of {rows.shape[1]}"


@FORMS
@pytest.mark.parametrize("num_threads", [1, 2])
def test_where_rows_lie_in_memory_changes_no_bit(num_threads: int, form: Callable[[torch.Tensor], Matrix]) -> None:
    """Rows of a wider tensor, and rows that begin at any address."""
    torch.set_num_threads(num_threads)
    for weight in weights(form=form):
        inner = weight.shape[1]
        rows, wide, narrow = random(48, inner), torch.empty(48, inner + 7), torch.empty(48 * inner + 5)
        wanted = weight.multiply(rows, None)
        for shift in range(5):
            wide[:, shift : shift + inner] = rows
            narrow[shift : shift + 48 * inner] = rows.flatten()
            assert torch.equal(weight.multiply(wide[:, shift : shift + inner], None), wanted)
            assert torch.equal(weight.multiply(narrow[shift : shift + 48 * inner].view(48, inner), None), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_measuring_twice_gives_the_same_ladders(dtype: torch.dtype) -> None:
    assert measure(dtype) == measure(dtype)


def test_measuring_takes_weights_of_odd_sizes() -> None:
    for form in (PlainMatrix, prepare):
        ladder = measure_linear([form(random(101, 33)), form(random(33, 101))])
        assert set(ladder.rungs) <= set(LOW_RUNGS)


# --- packed weights -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not can_pack(torch.float32), reason="this machine's torch has no packed product")
@pytest.mark.parametrize("rows", [1, 2, 61, 64, 65, 300])
@pytest.mark.parametrize(("columns", "inner"), [(1, 1), (15, 7), (64, 576), (65, 33), (200, 128)])
def test_a_packed_weight_multiplies_as_a_plain_one(rows: int, columns: int, inner: int) -> None:
    x, weight, bias = random(rows, inner), random(columns, inner, seed=1), random(columns, seed=2)
    plain, packed = PlainMatrix(weight), PackedMatrix.of(weight)
    assert packed.shape == plain.shape
    for add in (None, bias):
        torch.testing.assert_close(packed.multiply(x, add), plain.multiply(x, add), rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(not can_pack(torch.float32), reason="this machine's torch has no packed product")
def test_packed_rows_agree_at_every_count() -> None:
    """Not promised by oneDNN: where this fails, ladders have fewer rungs, and small batches are slower."""
    for weight in weights(form=PackedMatrix.of):
        assert measure_linear([weight]) == RowLadder(LOW_RUNGS, high=True)


def test_what_cannot_be_packed_stays_plain() -> None:
    weight = random(8, 8).to(torch.float64)
    assert not can_pack(torch.float64)
    assert prepare(weight) == PlainMatrix(weight)


# --- other machines -------------------------------------------------------------------------------------------


def test_where_no_two_counts_agree_there_is_one_fixed_tile() -> None:
    with Machine(by_count):
        ladders = measure()
    assert ladders.linear == ladders.attention == RowLadder((REFERENCE_ROWS,), high=False)
    assert ladders.linear.tile == REFERENCE_ROWS


def test_products_in_fixed_tiles_do_not_depend_on_the_row_count_even_there() -> None:
    rows, weight, bias = random(320, 32), PlainMatrix(random(96, 32)), random(96)
    with Machine(by_count):
        ladder = measure_linear([weight])
        whole = linear(rows, weight, bias, ladder)
        parts = torch.cat([linear(part, weight, bias, ladder) for part in rows.split(REFERENCE_ROWS)])
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("weigh", [weigh_by_tiles, weigh], ids=["reference", "cpu"])
@pytest.mark.parametrize("fault", [by_count, few_rows, last_rows])
def test_attention_gives_a_query_the_same_bits_in_any_chunk_even_there(
    fault: Callable[[int], torch.Tensor], weigh: Weigh
) -> None:
    """100 queries of three heads that share one KV head: 300 rows at once, or a few at a time."""
    num_tokens, groups, block_size = 100, 3, 4
    k, v = random(2, 64, 1, block_size, HEAD_DIM).unbind()
    q = random(num_tokens, groups, HEAD_DIM, seed=1)
    blocks = torch.arange(64)[None]
    with Machine(fault):
        ladder = measure(weigh=weigh).attention

        def attend(start: int, stop: int) -> torch.Tensor:
            segment = make_segment(slice(0, stop - start), [start], stop - start, blocks, groups, block_size, ladder)
            return paged_attention(q[start:stop], k, v, segment, HEAD_DIM**-0.5, weigh)

        whole = attend(0, num_tokens)
        for chunk in (1, 7, 30):
            parts = [attend(start, min(start + chunk, num_tokens)) for start in range(0, num_tokens, chunk)]
            assert torch.equal(torch.cat(parts), whole)


def test_counts_that_differ_are_not_rungs() -> None:
    plain = measure()
    with Machine(few_rows):
        found = measure()
    for before, after in ((plain.linear, found.linear), (plain.attention, found.attention)):
        assert after == RowLadder(tuple(rows for rows in before.rungs if rows > 4), before.high)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_another_order_of_additions_is_seen_in_any_type(dtype: torch.dtype) -> None:
    """bfloat16 rounds the trace of it away in nearly all results; a real model meets the others."""
    with Reordered():
        ladders = measure(dtype)
    assert min(ladders.linear.rungs) > 4
    assert min(ladders.attention.rungs) > 4


def test_a_fault_in_the_last_rows_only_is_seen() -> None:
    with Machine(last_rows):
        assert not measure().linear.high
        assert not measure(weigh=weigh).attention.high


def test_a_machine_where_the_place_matters_is_refused() -> None:
    with Machine(by_place):
        with pytest.raises(ArithmeticError, match="where in the batch"):
            measure_linear(weights())
        for one in (weigh_by_tiles, weigh):
            with pytest.raises(ArithmeticError, match="where in the batch"):
                measure_attention(HEAD_DIM, KV_TILE, torch.zeros(1), one)


def test_high_counts_need_the_rungs_that_cutting_tiles_leaves() -> None:
    """An output head is always cut into tiles of 64 rows; 80 rows leave 16."""

    def sixteen(rows: int) -> torch.Tensor:
        return torch.full((rows,), float(rows == 16))

    with Machine(sixteen):
        ladder = measure_linear(weights())
    assert 16 not in ladder.rungs
    assert not ladder.high


# --- linear ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 64, 128, 320])
@pytest.mark.parametrize("ladder", [FREE, RowLadder((64,), high=False)], ids=["free", "tiled"])
@pytest.mark.parametrize("columns", [7, MAX_HIGH_COLUMNS + 1])
@FORMS
def test_linear_is_a_product_and_a_bias_however_it_is_cut(
    rows: int, ladder: RowLadder, columns: int, form: Callable[[torch.Tensor], Matrix]
) -> None:
    x, weight, bias = random(rows, 6), random(columns, 6, seed=1), random(columns, seed=2)
    wanted = x.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(linear(x, form(weight), bias, ladder), wanted.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear(x, form(weight), None, ladder), (wanted - bias).float(), rtol=1e-5, atol=1e-5)
