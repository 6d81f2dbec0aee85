"""Paged attention over a sliding window, against a masked softmax in float64."""

from __future__ import annotations

import pytest
import torch

from kernels.cpu.attention import weigh
from kernels.reference.attention import first_key, make_segment, paged_attention, tile_tokens, weigh_by_tiles
from kernels.reference.ladder import FREE, RowLadder, Weigh, measure_attention

NAN = float("nan")
BLOCK, HEADS, KV_HEADS, DIM = 16, 4, 2, 16
SCALE = DIM**-0.5
WEIGHS = pytest.mark.parametrize("weigh", [weigh_by_tiles, weigh], ids=["reference", "cpu"])


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class Case:
    """One sequence; blocks that have left the window before `first_query` are poisoned like all unused slots."""

    def __init__(self, length: int, window: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.length, self.window = length, window
        self.q = torch.randn(length, HEADS, DIM, generator=generator)
        self.k, self.v = (torch.randn(length, KV_HEADS, DIM, generator=generator) for _ in range(2))
        self.num_blocks = -(-length // BLOCK) + 3
        self.order = torch.randperm(self.num_blocks, generator=generator).tolist()

    def attend(
        self, start: int, num_new: int, weigh: Weigh, ladder: RowLadder = FREE, query_tile: int = 128
    ) -> torch.Tensor:
        """Queries [start, start + num_new) -> [num_new, heads, dim]."""
        stop = start + num_new
        caches = torch.full((2, self.num_blocks, KV_HEADS, BLOCK, DIM), NAN)
        for position in range(max(0, start - self.window + 1) // BLOCK * BLOCK, stop):
            block, offset = self.order[position // BLOCK], position % BLOCK
            caches[0, block, :, offset], caches[1, block, :, offset] = self.k[position], self.v[position]
        first = first_key(start, self.window, BLOCK)
        width = -(-(stop - first) // tile_tokens(BLOCK)) * tile_tokens(BLOCK) // BLOCK
        ids = [
            self.order[first // BLOCK + index] if first // BLOCK + index < len(self.order) else self.order[0]
            for index in range(width)
        ]
        segment = make_segment(
            slice(0, num_new), [start], num_new, torch.tensor([ids]), HEADS // KV_HEADS, BLOCK, ladder, query_tile,
            self.window,
        )  # fmt: skip
        return paged_attention(self.q[start:stop], caches[0], caches[1], segment, SCALE, weigh)

    def explicit(self, start: int, num_new: int) -> torch.Tensor:
        rows = []
        for position in range(start, start + num_new):
            seen = slice(max(0, position - self.window + 1), position + 1)
            keys = self.k[seen].double().repeat_interleave(HEADS // KV_HEADS, dim=1)
            values = self.v[seen].double().repeat_interleave(HEADS // KV_HEADS, dim=1)
            scores = torch.einsum("hd,thd->ht", self.q[position].double(), keys) * SCALE
            rows.append(torch.einsum("ht,thd->hd", scores.softmax(-1), values))
        return torch.stack(rows)


@WEIGHS
@pytest.mark.parametrize("query_tile", [7, 128])
@pytest.mark.parametrize("window", [1, 5, 16, 130, 1000])
@pytest.mark.parametrize(("start", "num_new"), [(0, 1), (0, 40), (150, 1), (127, 3), (300, 17), (383, 1)])
def test_a_query_sees_its_window_and_nothing_that_lies_outside(
    window: int, start: int, num_new: int, query_tile: int, weigh: Weigh
) -> None:
    case = Case(start + num_new, window)
    got = case.attend(start, num_new, weigh, query_tile=query_tile)
    torch.testing.assert_close(got.double(), case.explicit(start, num_new), rtol=1e-5, atol=1e-5)


@WEIGHS
@pytest.mark.parametrize("window", [5, 200])
def test_results_are_equal_bit_for_bit_for_any_chunking(window: int, weigh: Weigh) -> None:
    ladder = measure_attention(DIM, tile_tokens(BLOCK), torch.zeros(1), weigh)
    case = Case(420, window)
    whole = case.attend(380, 40, weigh, ladder)
    for start, num_new, query_tile in ((380, 1, 64), (395, 7, 64), (380, 40, 9), (400, 20, 16), (419, 1, 64)):
        found = case.attend(start, num_new, weigh, ladder, query_tile)
        assert torch.equal(found, whole[start - 380 : start - 380 + num_new])
