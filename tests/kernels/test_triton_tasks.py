"""Tasks of attention: every query sees each of its keys in exactly one task, whatever the step is made of."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.backend import Call
from kernels.reference.attention import first_key, tile_tokens
from kernels.triton.tasks import Cut, TaskNumbers, make_tasks, most_parts

BLOCK = 16
CUTS = [
    Cut(tile_tokens=5, key_tile=64, split=0, least=256, num_shares=33),
    Cut(tile_tokens=32, key_tile=64, split=512, least=256, num_shares=33),
    Cut(tile_tokens=1, key_tile=32, split=0, least=64, num_shares=7),
]


def calls_of(shapes: list[tuple[int, int]], window: int | None = None) -> list[Call]:
    """Of one sequence each: (start, num_new). Block i of sequence n has the id 1000 n + i."""
    calls, row = [], 0
    for number, (start, num_new) in enumerate(shapes):
        begin, tile = first_key(start, window, BLOCK), tile_tokens(BLOCK)
        width = -(-(start + num_new - begin) // tile) * tile // BLOCK
        ids = 1000 * number + begin // BLOCK + np.arange(width)
        calls.append(Call(slice(row, row + num_new), (start,), num_new, ids[None]))
        row += num_new
    return calls


def keys_seen(made: TaskNumbers, tile_row: int) -> list[tuple[int, int]]:
    return sorted((int(task[3]), int(task[4])) for task in made.tasks if task[0] == tile_row)


@settings(deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 40)), min_size=0, max_size=12),
    cut=st.sampled_from(CUTS),
    window=st.sampled_from([None, 1, 50, 700]),
)
def test_tasks_cover_all_keys_of_all_tiles_once(
    shapes: list[tuple[int, int]], cut: Cut, window: int | None
) -> None:  # fmt: skip
    made = make_tasks(calls_of(shapes, window), window, BLOCK, cut)
    row, tiles = 0, {}
    for number, (start, num_new) in enumerate(shapes):
        for token in range(0, num_new, cut.tile_tokens):
            tiles[row + token] = (number, start + token, min(cut.tile_tokens, num_new - token))
        row += num_new
    assert {int(task[0]) for task in made.tasks} == set(tiles)
    merged = {int(merge[0]): (int(merge[2]), int(merge[3])) for merge in made.merges}
    for tile_row, (number, position, num_tokens) in tiles.items():
        seen = keys_seen(made, tile_row)
        lowest = 0 if window is None else max(0, position - window + 1)
        assert seen[0][0] <= lowest and seen[0][0] % cut.key_tile == 0 and seen[-1][1] == position + num_tokens
        assert all(stop == begin for (_, stop), (begin, _) in pairwise(seen))
        own = sorted((task for task in made.tasks if task[0] == tile_row), key=lambda task: task[3])
        for task in own:
            assert (task[1], task[2]) == (num_tokens, position)
            first_block = max(lowest, int(task[3])) // BLOCK
            assert made.tables[task[5] + first_block] == 1000 * number + first_block
        parts = [int(task[6]) for task in own]
        if len(own) == 1:
            assert parts == [-1] and tile_row not in merged
        else:
            assert parts == [*range(*merged[tile_row])], "parts lie in the order of their keys"
            assert all((merged[tile_row + token]) == merged[tile_row] for token in range(num_tokens))
            assert max(parts) < made.num_parts
            assert not cut.split or all(begin % cut.split == 0 for begin, _ in seen[1:])
    for more in (0, 1, 40):
        assert made.num_parts <= most_parts(len(tiles) + more, cut, 6000)


def test_long_tasks_come_first() -> None:
    made = make_tasks(calls_of([(10, 1), (5000, 1), (700, 30)]), None, BLOCK, replace(CUTS[0], num_shares=4))
    lengths = made.tasks[:, 4] - made.tasks[:, 3]
    assert list(lengths) == sorted(lengths, reverse=True)


@pytest.mark.parametrize("num_seqs", [1, 3, 16])
def test_a_few_long_sequences_are_shared_out_evenly(num_seqs: int) -> None:
    made = make_tasks(calls_of([(8000, 1)] * num_seqs), None, BLOCK, CUTS[0])
    assert 3 * 33 // 4 <= len(made.tasks) <= 33 + 2 * num_seqs
    lengths = made.tasks[:, 4] - made.tasks[:, 3]
    assert lengths.max() <= -(-8001 * num_seqs // 33) + 64
