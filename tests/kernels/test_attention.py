"""Paged attention against an explicit softmax in float64 over keys and values that lie side by side."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from kernels.cpu.attention import weigh
from kernels.reference.attention import KV_TILE, make_segment, paged_attention, tile_tokens, weigh_by_tiles
from kernels.reference.ladder import FREE, RowLadder, Weigh, measure_attention

NAN = float("nan")
COARSE = RowLadder((24, 64), high=False)  # pads and cuts more than any real machine
WEIGHS = pytest.mark.parametrize("weigh", [weigh_by_tiles, weigh], ids=["reference", "cpu"])


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """As an engine by default; more only wait for each other on products this small."""
    torch.set_num_threads(1)


@dataclass
class Case:
    """Sequences over one poisoned pool. `queries[i]`: [num_new, num_heads, head_dim], the last tokens of sequence i."""

    queries: list[torch.Tensor]
    keys: list[torch.Tensor]  # [num_tokens, num_kv_heads, head_dim]
    values: list[torch.Tensor]
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    blocks: torch.Tensor

    @property
    def lengths(self) -> list[int]:
        return [len(keys) for keys in self.keys]


def make_case(
    lengths: list[int], num_new: int, num_heads: int = 4, num_kv_heads: int = 2, head_dim: int = 16,
    block_size: int = 16, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0,
) -> Case:  # fmt: skip
    """Random tensors in randomly placed blocks. Unused slots are NaN; table entries past the end point anywhere."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    queries = [random(num_new, num_heads, head_dim) for _ in lengths]
    keys, values = ([random(length, num_kv_heads, head_dim) for length in lengths] for _ in range(2))
    tile = tile_tokens(block_size)
    width = -(-max(lengths) // tile) * tile // block_size
    num_blocks = len(lengths) * width + 5
    k_cache = torch.full((num_blocks, num_kv_heads, block_size, head_dim), NAN, dtype=dtype)
    v_cache = k_cache.clone()
    order = torch.randperm(num_blocks, generator=generator)
    blocks = torch.randint(num_blocks, (len(lengths), width), generator=generator)
    for index, length in enumerate(lengths):
        used = -(-length // block_size)
        own = order[index * width : index * width + used]
        blocks[index, :used] = own
        for position in range(length):
            block, offset = own[position // block_size], position % block_size
            k_cache[block, :, offset] = keys[index][position]
            v_cache[block, :, offset] = values[index][position]
    return Case(queries, keys, values, k_cache, v_cache, blocks)


def attend(
    case: Case, ladder: RowLadder = FREE, blocks: torch.Tensor | None = None, weigh: Weigh = weigh_by_tiles,
    query_tile: int = 128,
) -> torch.Tensor:  # fmt: skip
    """[num_seqs, num_new, num_heads, head_dim]"""
    q = torch.cat(case.queries)
    num_new, num_heads, head_dim = case.queries[0].shape
    positions = [length - num_new for length in case.lengths]
    groups, block_size = num_heads // case.k_cache.shape[1], case.k_cache.shape[2]
    segment = make_segment(
        slice(0, len(q)), positions, num_new, case.blocks if blocks is None else blocks, groups, block_size, ladder,
        query_tile,
    )  # fmt: skip
    out = paged_attention(q, case.k_cache, case.v_cache, segment, head_dim**-0.5, weigh)
    assert out.shape == q.shape and out.dtype == q.dtype
    return out.view(-1, num_new, num_heads, head_dim)


def softmax_attention(case: Case, index: int) -> torch.Tensor:
    """The definition, one query and head at a time."""
    queries, keys, values = (part[index].double() for part in (case.queries, case.keys, case.values))
    num_new, num_heads, head_dim = queries.shape
    groups = num_heads // keys.shape[1]
    out = torch.empty_like(queries)
    for row in range(num_new):
        seen = len(keys) - num_new + row + 1
        for head in range(num_heads):
            scores = keys[:seen, head // groups] @ queries[row, head] / head_dim**0.5
            out[row, head] = torch.softmax(scores, dim=0) @ values[:seen, head // groups]
    return out


def check(case: Case, out: torch.Tensor, tolerance: float = 2e-6) -> None:
    for index in range(len(case.lengths)):
        wanted = softmax_attention(case, index)
        torch.testing.assert_close(out[index].double(), wanted, rtol=tolerance, atol=tolerance)


CASES = {
    "one token": ([1], 1),
    "a whole prompt": ([37], 37),
    "a chunk behind a stored prefix": ([150], 23),
    "one new token each, of many lengths": ([1, 16, 17, 100, 128, 129, 300], 1),
    "two tiles exactly": ([256], 5),
    "chunks of two sequences": ([40, 200], 12),
}


@WEIGHS
@pytest.mark.parametrize("ladder", [FREE, COARSE], ids=["free", "coarse"])
@pytest.mark.parametrize("block_size", [1, 4, 16, 48])
@pytest.mark.parametrize(("lengths", "num_new"), CASES.values(), ids=CASES)
def test_it_equals_an_explicit_softmax(
    lengths: list[int], num_new: int, block_size: int, ladder: RowLadder, weigh: Weigh
) -> None:
    case = make_case(lengths, num_new, block_size=block_size, seed=block_size)
    for query_tile in (5, 128):
        check(case, attend(case, ladder, weigh=weigh, query_tile=query_tile))


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (4, 4), (6, 2), (8, 2), (9, 3), (5, 1)])
@pytest.mark.parametrize("head_dim", [2, 8, 64])
def test_heads_share_keys_in_groups(num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    case = make_case([60, 131], 7, num_heads, num_kv_heads, head_dim)
    check(case, attend(case, COARSE))


@WEIGHS
def test_large_logits_stay_finite_and_right(weigh: Weigh) -> None:
    """Scores of +-1e4, where exp alone would overflow."""
    case = make_case([140, 9], 4, scale=60.0)
    scores = case.keys[0][:, 0] @ case.queries[0][0, 0] / 4
    assert scores.abs().max() > 1e4 and scores.min() < -3e3
    out = attend(case, weigh=weigh)
    assert out.isfinite().all()
    check(case, out, tolerance=2e-3)  # a score of 1e4 has an error of 1e-3 in float32


def test_bfloat16_is_as_close_as_bfloat16_can_be() -> None:
    case = make_case([150, 33, 8], 5, dtype=torch.bfloat16)
    check(case, attend(case, COARSE), tolerance=2e-2)


KINDS = pytest.mark.parametrize(
    ("dtype", "weigh"),
    [(torch.float32, weigh_by_tiles), (torch.float32, weigh), (torch.bfloat16, weigh_by_tiles)],
    ids=["float32, reference", "float32, cpu", "bfloat16, reference"],
)


@KINDS
def test_entries_past_the_end_may_point_anywhere(dtype: torch.dtype, weigh: Weigh) -> None:
    case = make_case([20, 150], 3, dtype=dtype)
    wanted = attend(case, weigh=weigh)
    for block_id in range(0, len(case.k_cache), 7):
        blocks = case.blocks.clone()
        blocks[0, 2:] = block_id
        blocks[1, 10:] = block_id
        assert torch.equal(attend(case, blocks=blocks, weigh=weigh), wanted)


@WEIGHS
def test_what_lies_in_unused_slots_changes_no_bit(weigh: Weigh) -> None:
    case = make_case([20, 150], 3)
    wanted = attend(case, weigh=weigh)
    for rubbish in (0.0, 1e30, float("inf"), float("-inf")):
        for cache in (case.k_cache, case.v_cache):
            cache[cache.isnan()] = rubbish
        assert torch.equal(attend(case, weigh=weigh), wanted)
        for cache in (case.k_cache, case.v_cache):
            cache[cache == rubbish] = NAN


@KINDS
def test_a_sequence_has_the_same_bits_beside_others_as_alone(dtype: torch.dtype, weigh: Weigh) -> None:
    lengths = [5, 140, 129, 17, 250]
    case = make_case(lengths, 1, dtype=dtype)
    ladder = measure_attention(16, KV_TILE, torch.zeros(1, dtype=dtype), weigh)
    together = attend(case, ladder, weigh=weigh)
    for index, length in enumerate(lengths):
        width = -(-length // KV_TILE) * KV_TILE // 16
        alone = Case(
            [case.queries[index]], [case.keys[index]], [case.values[index]], case.k_cache, case.v_cache,
            case.blocks[index : index + 1, :width],
        )  # fmt: skip
        assert torch.equal(attend(alone, ladder, weigh=weigh)[0], together[index])


@KINDS
def test_a_query_has_the_same_bits_in_any_query_tile(dtype: torch.dtype, weigh: Weigh) -> None:
    case = make_case([700], 300, num_heads=9, num_kv_heads=3, head_dim=64, dtype=dtype)
    ladder = measure_attention(64, KV_TILE, torch.zeros(1, dtype=dtype), weigh)
    wanted = attend(case, ladder, weigh=weigh, query_tile=1)
    for query_tile in (3, 64, 100, 512):
        assert torch.equal(attend(case, ladder, weigh=weigh, query_tile=query_tile), wanted)


def test_a_table_that_is_not_padded_to_whole_tiles_is_refused() -> None:
    case = make_case([20], 1)
    with pytest.raises(AssertionError, match="whole tiles"):
        attend(case, blocks=case.blocks[:, :3])


@pytest.mark.parametrize(("block_size", "tokens"), [(1, 128), (16, 128), (48, 144), (100, 200), (128, 128), (256, 256)])
def test_a_key_tile_is_whole_blocks_of_at_least_128_positions(block_size: int, tokens: int) -> None:
    assert tile_tokens(block_size) == tokens
