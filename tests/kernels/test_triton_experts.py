"""A layer's experts in Triton against the loop that computes them one by one, and where rows go."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch

from engine.models import moe
from kernels.backend import Gate, Routing
from kernels.reference.attention import weigh_by_tiles
from kernels.reference.backend import TorchBackend
from kernels.reference.matrix import PlainMatrix
from kernels.reference.quantized import Bits
from tests.kernels.interpreted import EACH_DEVICE, TYPES, random

from kernels.triton.backend import TritonBackend  # isort: skip
from kernels.triton.experts import TritonMixture, tiling_for  # isort: skip
from kernels.triton.routing import most_tiles, route  # isort: skip

NAN = float("nan")
# One rounding to bfloat16 more or less in a sum of a few; the interpreter cuts off where a device rounds.
CLOSE: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}
HIDDEN, INNER = 100, 20  # more than one step of a sum


def weights_of(num_experts: int, dtype: torch.dtype, device: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Gates with ups, and downs."""
    gate_ups = [random(2 * INNER, HIDDEN, seed=seed) / 10 for seed in range(num_experts)]
    downs = [random(HIDDEN, INNER, seed=100 + seed) / 12 for seed in range(num_experts)]
    return [one.to(device, dtype) for one in gate_ups], [one.to(device, dtype) for one in downs]


def mixture_of(
    routing: Routing, dtype: torch.dtype, device: str, is_invariant: bool = True, gate: Gate = "silu", bits: Bits = 16
) -> TritonMixture:
    gate_ups, downs = weights_of(routing.num_experts, dtype, device)
    backend = TritonBackend(torch.empty(0, dtype=dtype, device=device), is_invariant)
    return backend.mixture(gate_ups, downs, gate, routing, bits)


def loop_of(
    routing: Routing, dtype: torch.dtype, device: str, gate: Gate = "silu", bits: Bits = 16
) -> moe.OneByOne:  # fmt: skip
    backend = TorchBackend(torch.empty(0, dtype=dtype, device=device), PlainMatrix, weigh_by_tiles, 64)
    pairs = zip(*weights_of(routing.num_experts, dtype, device), strict=True)
    experts = tuple(
        moe.Mlp(backend.linear(up, None, gate, bits), backend.linear(down, None, bits=bits)) for up, down in pairs
    )
    return moe.OneByOne(experts, routing, backend)


def leaning(logits: torch.Tensor, **bonuses: float) -> torch.Tensor:
    """To or from experts, by number."""
    for name, bonus in bonuses.items():
        logits[:, int(name[1:])] += bonus
    return logits


def tied(logits: torch.Tensor) -> torch.Tensor:
    """Few different numbers, so that rows have the same one for several experts."""
    return logits.clamp(-1, 1).round()


CASES = {
    "every expert has some": (Routing(5, 2, True), random(9, 5)),
    "some have none": (Routing(6, 2, True), leaning(random(9, 6), e0=-30, e3=-30, e5=-30)),
    "one has all, in two tiles": (Routing(3, 1, False), leaning(random(70, 3), e1=30)),
    "one row": (Routing(7, 3, True), random(1, 7)),
    "all are equal": (Routing(5, 2, False), torch.zeros(4, 5)),
    "many are equal": (Routing(6, 4, False), tied(random(9, 6))),
    "all experts for each row": (Routing(4, 4, True), random(3, 4)),
    "one expert": (Routing(1, 1, True), random(3, 1)),
    "hundreds of rows": (Routing(2, 1, True), random(230, 2)),
}
EACH_CASE = pytest.mark.parametrize("name", CASES)


@EACH_DEVICE
@TYPES
@pytest.mark.parametrize("is_invariant", [False, True], ids=["free", "invariant"])
@EACH_CASE
def test_experts_are_those_of_the_loop(name: str, is_invariant: bool, dtype: torch.dtype, device: str) -> None:
    routing, logits = CASES[name]
    logits, x = logits.to(device, dtype), random(len(logits), HIDDEN, dtype=dtype, device=device, seed=7)
    got = mixture_of(routing, dtype, device, is_invariant)(x, logits)
    torch.testing.assert_close(got, loop_of(routing, dtype, device)(x, logits), **CLOSE[dtype])


@EACH_DEVICE
@pytest.mark.parametrize(("gate", "bits"), [("gelu_tanh", 16), ("silu", 8), ("silu", 4)])
def test_gates_and_bits_are_those_of_the_loop(gate: Gate, bits: Bits, device: str) -> None:
    routing, logits = Routing(3, 2, True), random(5, 3, device=device)
    x = random(5, HIDDEN, device=device, seed=7)
    got = mixture_of(routing, torch.float32, device, gate=gate, bits=bits)(x, logits)
    wanted = loop_of(routing, torch.float32, device, gate, bits)(x, logits)
    torch.testing.assert_close(got, wanted, **CLOSE[torch.float32])


@EACH_DEVICE
@TYPES
def test_a_row_has_its_bits_in_any_batch_and_place(dtype: torch.dtype, device: str) -> None:
    routing, logits = Routing(3, 2, True), leaning(random(80, 3), e1=3).to(device, dtype)
    x, mixture = random(80, HIDDEN, dtype=dtype, device=device, seed=7), mixture_of(routing, dtype, device)
    whole = mixture(x, logits)
    shuffled = torch.randperm(80, generator=torch.Generator().manual_seed(1)).to(device)
    for rows in (shuffled, shuffled[:1], shuffled[5:30], torch.arange(63, 80, device=device)):
        assert torch.equal(mixture(x[rows], logits[rows]), whole[rows])


@TYPES
def test_tiles_have_one_shape_where_bits_must_not_depend_on_how_many_rows_there_are(dtype: torch.dtype) -> None:
    """What an interpreter's sums would hardly show."""
    shapes = [{tiling_for(rows, Routing(8, 2, True), dtype, one) for rows in range(1, 999)} for one in (False, True)]
    assert [len(shape) for shape in shapes] == [1 if dtype == torch.float32 else 3, 1]


@EACH_DEVICE
@pytest.mark.parametrize("tile_rows", [1, 4, 64])
@EACH_CASE
def test_pairs_lie_side_by_side_by_expert(name: str, tile_rows: int, device: str) -> None:
    routing, logits = CASES[name]
    routes, (shares, ids) = (
        route(logits.to(device), routing, tile_rows), moe.route(logits, routing.per_row, routing.normalize)
    )  # fmt: skip
    in_use = [tile for tile in routes.tiles.tolist() if tile[1] < tile[2]]
    assert [tile for tile in routes.tiles.tolist() if tile not in in_use] == [[0, 0, 0]] * (
        len(routes.tiles) - len(in_use)
    )
    assert [slot for _, first, stop in in_use for slot in range(first, stop)] == list(range(ids.numel()))
    assert all(stop - first <= tile_rows for _, first, stop in in_use)
    assert len(in_use) == sum(-(-count // tile_rows) for count in ids.flatten().bincount().tolist())
    expert_of = [expert for expert, first, stop in in_use for _ in range(first, stop)]
    assert expert_of == sorted(expert_of)
    in_order = ids.sort(dim=1)
    assert [[expert_of[slot] for slot in slots] for slots in routes.slots.tolist()] == in_order.values.tolist()
    torch.testing.assert_close(routes.weights.cpu(), shares.gather(1, in_order.indices), **CLOSE[torch.float32])
    wanted = torch.arange(len(ids))[:, None].expand_as(ids)
    assert torch.equal(routes.rows.cpu()[routes.slots.cpu().long()].long(), wanted)


@pytest.mark.parametrize("tile_rows", [1, 2, 3, 5])
def test_tables_have_room_for_every_distribution_and_no_more(tile_rows: int) -> None:
    worst = dict[int, int]()
    for counts in product(range(8), repeat=4):
        num_tiles = sum(-(-count // tile_rows) for count in counts)
        worst[sum(counts)] = max(worst.get(sum(counts), 0), num_tiles)
    assert all(most_tiles(num_pairs, 4, tile_rows) == worst[num_pairs] for num_pairs in range(8))
    assert all(most_tiles(num_pairs, 4, tile_rows) >= num_tiles for num_pairs, num_tiles in worst.items())


@EACH_DEVICE
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("bad", [NAN, float("inf"), float("-inf")])
def test_a_row_without_numbers_spoils_no_other(bad: float, device: str) -> None:
    routing, logits = Routing(5, 2, True), random(4, 5, device=device)
    x, mixture = random(4, HIDDEN, device=device, seed=7), mixture_of(routing, torch.float32, device)
    wanted = mixture(x, logits)
    logits[1] = bad
    got = mixture(x, logits)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2, 3]], wanted[[0, 2, 3]])


@EACH_DEVICE
def test_no_rows_are_no_launch(device: str) -> None:
    routing, none = Routing(5, 2, True), torch.empty(0, HIDDEN, device=device)
    assert mixture_of(routing, torch.float32, device)(none, none[:, :5]).shape == (0, HIDDEN)


def test_weights_are_let_go_as_they_are_stacked() -> None:
    born = list[weakref.ref[torch.Tensor]]()

    def weights(*shape: int) -> Iterator[torch.Tensor]:
        for _ in range(4):
            assert sum(one() is not None for one in born) <= 1
            weight = torch.ones(*shape)
            born.append(weakref.ref(weight))
            yield weight
            del weight

    backend = TritonBackend(torch.empty(0), is_invariant=True)
    mixture = backend.mixture(weights(2 * INNER, HIDDEN), weights(HIDDEN, INNER), "silu", Routing(4, 2, True), 16)
    assert mixture.gate_up.shape == (4, 2 * INNER, HIDDEN) and mixture.down.shape == (4, HIDDEN, INNER)
    assert len(born) == 8 and all(one() is None for one in born)
