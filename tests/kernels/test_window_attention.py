"""Paged attention over a sliding window, against a masked softmax in float64."""

from __future__ import annotations

import pytest
import torch

from kernels.reference.attention import first_key, make_segment, paged_attention, tile_tokens
from kernels.reference.ladder import FREE, measure_ladder

NAN = float("nan")
BLOCK, HEADS, KV_HEADS, DIM = 16, 4, 2, 16
SCALE = DIM**-0.5


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

    def attend(self, start: int, num_new: int, ladder=FREE) -> torch.Tensor:
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
            slice(0, num_new), torch.arange(start, stop)[None], torch.tensor([ids]), [stop], HEADS // KV_HEADS, BLOCK,
            ladder, self.window,
        )  # fmt: skip
        return paged_attention(self.q[start:stop], caches[0], caches[1], segment, SCALE)

    def explicit(self, start: int, num_new: int) -> torch.Tensor:
        rows = []
        for position in range(start, start + num_new):
            seen = slice(max(0, position - self.window + 1), position + 1)
            keys = self.k[seen].double().repeat_interleave(HEADS // KV_HEADS, dim=1)
            values = self.v[seen].double().repeat_interleave(HEADS // KV_HEADS, dim=1)
            scores = torch.einsum("hd,thd->ht", self.q[position].double(), keys) * SCALE
            rows.append(torch.einsum("ht,thd->hd", scores.softmax(-1), values))
        return torch.stack(rows)


@pytest.mark.parametrize("window", [1, 5, 16, 130, 1000])
@pytest.mark.parametrize(("start", "num_new"), [(0, 1), (0, 40), (150, 1), (127, 3), (300, 17), (383, 1)])
def test_a_query_sees_its_window_and_nothing_that_lies_outside(window: int, start: int, num_new: int) -> None:
    case = Case(start + num_new, window)
    torch.testing.assert_close(
        case.attend(start, num_new).double(), case.explicit(start, num_new), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("window", [5, 200])
def test_results_are_equal_bit_for_bit_for_any_chunking(window: int) -> None:
    ladder = measure_ladder([torch.zeros(32, 32)], DIM, tile_tokens(BLOCK))
    case = Case(420, window)
    whole = case.attend(380, 40, ladder)
    for start, num_new in ((380, 1), (395, 7), (400, 20), (419, 1)):
        assert torch.equal(case.attend(start, num_new, ladder), whole[start - 380 : start - 380 + num_new])
