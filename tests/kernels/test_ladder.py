"""The row ladder: which row counts give equal bits on this machine, and what is done where they do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from kernels.reference.attention import make_segment, paged_attention
from kernels.reference.ladder import (
    FREE,
    HIGH_SAMPLES,
    LOW_RUNGS,
    MAX_HIGH_COLUMNS,
    REFERENCE_ROWS,
    RowLadder,
    linear,
    measure_ladder,
)

HEAD_DIM, KV_TILE = 16, 128
SHAPES = ((96, 32), (32, 32), (160, 32), (32, 80))
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """As an engine by default; more only wait for each other on products this small."""
    torch.set_num_threads(1)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [random(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(SHAPES)]


class Machine(TorchFunctionMode):
    """A machine whose products differ from the real ones by `fault(rows)`: [rows] added to each row."""

    def __init__(self, fault: Callable[[int], torch.Tensor]) -> None:
        super().__init__()
        self.fault = fault

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (F.linear, torch.bmm):
            out = out + self.fault(out.shape[-2])[:, None].to(out.dtype)
        return out


class Reordered(TorchFunctionMode):
    """A machine that adds in the opposite order where there are at most four rows."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and len(args[0]) <= 4:
            args = (args[0].flip(1), args[1].flip(1), *args[2:])
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_listed_rung_agrees_on_this_machine(dtype: torch.dtype) -> None:
    """With rows that lie anywhere, for the products of linear layers and of attention."""
    ladder = measure_ladder(weights(dtype), HEAD_DIM, KV_TILE)
    assert REFERENCE_ROWS in ladder.rungs
    counts = [*ladder.rungs, *(HIGH_SAMPLES if ladder.high else (128, 192)), ladder.pad(300)]
    keys, values = random(1, 256, HEAD_DIM, dtype=dtype), random(1, KV_TILE, HEAD_DIM, dtype=dtype)
    products: list[tuple[int, Callable[[torch.Tensor], torch.Tensor]]] = [
        (weight.shape[1], lambda x, w=weight: linear(x, w, None, ladder)) for weight in weights(dtype)
    ]
    if ladder.high:
        products.append((HEAD_DIM, lambda x: torch.bmm(x[None], keys.transpose(1, 2))[0]))
        products.append((KV_TILE, lambda x: torch.bmm(x[None], values)[0]))
    for inner, product in products:
        rows = random(53, inner, dtype=dtype, seed=9)
        wanted = product(rows[torch.arange(REFERENCE_ROWS) % 53])[:53]
        for count in counts:
            for shift in (0, 1, 17):
                places = (torch.arange(count) + shift) % 53
                assert torch.equal(product(rows[places]), wanted[places]), f"{count} rows of {inner}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_measuring_twice_gives_the_same_ladder(dtype: torch.dtype) -> None:
    assert measure_ladder(weights(dtype), HEAD_DIM, KV_TILE) == measure_ladder(weights(dtype), HEAD_DIM, KV_TILE)


def test_measuring_takes_weights_of_odd_sizes() -> None:
    ladder = measure_ladder([random(101, 33), random(33, 101)], HEAD_DIM, KV_TILE)
    assert set(ladder.rungs) <= set(LOW_RUNGS)


# --- other machines -------------------------------------------------------------------------------------------


def test_where_no_two_counts_agree_there_is_one_fixed_tile() -> None:
    with Machine(by_count):
        ladder = measure_ladder(weights(), HEAD_DIM, KV_TILE)
    assert ladder == RowLadder((REFERENCE_ROWS,), high=False)
    assert ladder.tile == REFERENCE_ROWS


def test_products_in_fixed_tiles_do_not_depend_on_the_row_count_even_there() -> None:
    rows, weight, bias = random(320, 32), random(96, 32), random(96)
    with Machine(by_count):
        ladder = measure_ladder([weight], HEAD_DIM, KV_TILE)
        whole = linear(rows, weight, bias, ladder)
        parts = torch.cat([linear(part, weight, bias, ladder) for part in rows.split(REFERENCE_ROWS)])
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("fault", [by_count, few_rows, last_rows])
def test_attention_gives_a_query_the_same_bits_in_any_chunk_even_there(
    fault: Callable[[int], torch.Tensor],
) -> None:
    """100 queries of three heads that share one KV head: 300 rows at once, or a few at a time."""
    num_tokens, groups, block_size = 100, 3, 4
    k, v = random(2, 64, 1, block_size, HEAD_DIM).unbind()
    q = random(num_tokens, groups, HEAD_DIM, seed=1)
    blocks = torch.arange(64)[None]
    with Machine(fault):
        ladder = measure_ladder(weights(), HEAD_DIM, KV_TILE)

        def attend(start: int, stop: int) -> torch.Tensor:
            positions = torch.arange(start, stop)[None]
            segment = make_segment(slice(0, stop - start), positions, blocks, [stop], groups, block_size, ladder)
            return paged_attention(q[start:stop], k, v, segment, HEAD_DIM**-0.5)

        whole = attend(0, num_tokens)
        for chunk in (1, 7, 30):
            parts = [attend(start, min(start + chunk, num_tokens)) for start in range(0, num_tokens, chunk)]
            assert torch.equal(torch.cat(parts), whole)


def test_counts_that_differ_are_not_rungs() -> None:
    plain = measure_ladder(weights(), HEAD_DIM, KV_TILE)
    with Machine(few_rows):
        ladder = measure_ladder(weights(), HEAD_DIM, KV_TILE)
    assert ladder == RowLadder(tuple(rows for rows in plain.rungs if rows > 4), plain.high)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_another_order_of_additions_is_seen_in_any_type(dtype: torch.dtype) -> None:
    """bfloat16 rounds the trace of it away in nearly all results; a real model meets the others."""
    with Reordered():
        ladder = measure_ladder(weights(dtype), HEAD_DIM, KV_TILE)
    assert min(ladder.rungs) > 4


def test_a_fault_in_the_last_rows_only_is_seen() -> None:
    with Machine(last_rows):
        assert not measure_ladder(weights(), HEAD_DIM, KV_TILE).high


def test_a_machine_where_the_place_matters_is_refused() -> None:
    with Machine(by_place), pytest.raises(ArithmeticError, match="where in the batch"):
        measure_ladder(weights(), HEAD_DIM, KV_TILE)


def test_high_counts_need_the_rungs_that_cutting_tiles_leaves() -> None:
    """An output head is always cut into tiles of 64 rows; 80 rows leave 16."""

    def sixteen(rows: int) -> torch.Tensor:
        return torch.full((rows,), float(rows == 16))

    with Machine(sixteen):
        ladder = measure_ladder(weights(), HEAD_DIM, KV_TILE)
    assert 16 not in ladder.rungs
    assert not ladder.high


# --- linear ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 64, 128, 320])
@pytest.mark.parametrize("ladder", [FREE, RowLadder((64,), high=False)], ids=["free", "tiled"])
@pytest.mark.parametrize("columns", [7, MAX_HIGH_COLUMNS + 1])
def test_linear_is_a_product_and_a_bias_however_it_is_cut(rows: int, ladder: RowLadder, columns: int) -> None:
    x, weight, bias = random(rows, 6), random(columns, 6, seed=1), random(columns, seed=2)
    wanted = x.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(linear(x, weight, bias, ladder), wanted.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear(x, weight, None, ladder), (wanted - bias).float(), rtol=1e-5, atol=1e-5)
