"""Paged attention, causal, grouped-query: queries of one or many sequences over KV that lies in blocks.

1. `make_segment`, once per step: sequences with equally many new tokens, cut into QueryTiles.
2. `paged_attention`, in every layer: keys and values are gathered from their blocks, once for all query tiles.
3. Each query tile sees the tiles of keys up to its last position; only what its first query does not see is masked.

The order of additions for a query depends only on its own position, so results are equal bit for bit for any
chunking, batch and block placement: keys are taken in tiles of KV_TILE positions from 0; a tile that a query does not
see adds exact zeros; row counts come from a RowLadder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels.reference.ladder import RowLadder, Weigh

KV_TILE = 128  # positions; block tables are padded to whole tiles


@dataclass(frozen=True, slots=True)
class QueryTile:
    """Some of the new tokens of each sequence, whose scores are computed at once.

    tokens: which of the new ones; keys: whole key tiles, of those that the segment gathers
    mask: [num_seqs, 1, padded_rows, num_masked] of the last of these keys, True where a query must not look; rows are
        (token, group) pairs
    """

    tokens: slice
    keys: slice
    mask: torch.Tensor


@dataclass(frozen=True, slots=True)
class Segment:
    """Sequences with equally many new tokens. Built once per step, used by every layer that sees as far back.

    rows: which rows of the step's tokens, [num_seqs * num_new], sequence by sequence
    blocks: [num_seqs, num_blocks] int64, whole tiles, padded with any valid id
    stale: gathered keys that no query of a sequence may see, as (sequence, which): what lies there may be anything
    key_tile: positions in a tile of keys
    row_tile: most rows of one product, where the machine needs a fixed count (RowLadder.tile)
    """

    num_seqs: int
    num_new: int
    rows: slice
    blocks: torch.Tensor
    tiles: tuple[QueryTile, ...]
    stale: tuple[tuple[int, slice], ...]
    key_tile: int
    row_tile: int | None


def tile_tokens(block_size: int) -> int:
    """Positions per key tile: the least multiple of the block size that is at least KV_TILE."""
    return -(-KV_TILE // block_size) * block_size


def first_key(position: int, window: int | None, block_size: int) -> int:
    """Where the keys of a query at `position` begin: the start of the tile with the first one that it sees."""
    tile = tile_tokens(block_size)
    return 0 if window is None else max(0, position - window + 1) // tile * tile


def make_segment(
    rows: slice, positions: list[int], num_new: int, blocks: torch.Tensor, groups: int, block_size: int,
    ladder: RowLadder, query_tile: int = KV_TILE, window: int | None = None,
) -> Segment:  # fmt: skip
    """positions: of each sequence's first new token; blocks: of each sequence from `first_key` of that position on.
    A query sees `window` positions, its own included (None: all up to its own)."""
    num_keys = blocks.shape[1] * block_size
    assert num_keys % tile_tokens(block_size) == 0, "block tables must be padded to whole tiles"
    # from here on positions count from the first key that is gathered
    starts = [position - first_key(position, window, block_size) for position in positions]
    cuts = [slice(first, min(first + query_tile, num_new)) for first in range(0, num_new, query_tile)]
    device = blocks.device
    tiles = tuple(_query_tile(starts, cut, groups, block_size, ladder, window, device) for cut in cuts)
    stale = [(index, start + num_new, num_keys) for index, start in enumerate(starts)]
    if window is not None:
        stale += [(index, 0, start - window + 1) for index, start in enumerate(starts)]
    stale = tuple((index, slice(first, stop)) for index, first, stop in stale if first < stop)
    key_tile = tile_tokens(block_size)
    return Segment(len(starts), num_new, rows, blocks, tiles, stale, key_tile, ladder.tile)


def _query_tile(
    starts: list[int], tokens: slice, groups: int, block_size: int, ladder: RowLadder, window: int | None,
    device: torch.device,
) -> QueryTile:  # fmt: skip
    """Its keys end with the tile of its last query. What lies before its first query needs no mask without a window."""
    tile = tile_tokens(block_size)
    firsts = [start + tokens.start for start in starts]
    seen_from = min(first_key(first, window, block_size) for first in firsts)
    keys = slice(seen_from, -(-(max(starts) + tokens.stop) // tile) * tile)
    masked_from = seen_from if window is not None else min(firsts) + 1
    places = torch.arange(masked_from, keys.stop)
    queries = (torch.tensor(starts)[:, None] + torch.arange(tokens.start, tokens.stop)).repeat_interleave(groups, dim=1)
    queries = queries[..., None]  # [num_seqs, rows, 1]
    unseen = places > queries
    if window is not None:
        unseen |= places <= queries - window
    mask = torch.zeros(len(starts), ladder.pad(queries.shape[1]), len(places), dtype=torch.bool)
    mask[:, : unseen.shape[1]] = unseen
    return QueryTile(tokens, keys, mask[:, None].to(device))


def paged_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, segment: Segment, scale: float,
    weigh: Weigh,
) -> torch.Tensor:  # fmt: skip
    """q: [num_seqs * num_new, num_heads, head_dim]; caches: [num_blocks, num_kv_heads, block_size, head_dim].

    Returns the shape of q. Unused cache slots may hold anything, NaN included. weigh: weigh_by_tiles, or faster."""
    num_seqs, num_kv_heads, head_dim = segment.num_seqs, k_cache.shape[1], q.shape[2]
    records = _records(segment.blocks, num_kv_heads)
    keys = _gather(k_cache, records, num_seqs).transpose(1, 2)  # [num_seqs * num_kv_heads, head_dim, num_keys]
    values = _gather(v_cache, records, num_seqs)  # [num_seqs * num_kv_heads, num_keys, head_dim]
    for index, which in segment.stale:
        values[index * num_kv_heads : (index + 1) * num_kv_heads, which].zero_()  # 0 * NaN would be NaN
    # [num_seqs, num_kv_heads, num_new, groups, head_dim]: queries that share a KV head side by side
    queries = (q * scale).view(num_seqs, segment.num_new, num_kv_heads, -1, head_dim).transpose(1, 2)
    found = []
    for tile in segment.tiles:
        rows = queries[:, :, tile.tokens]
        out = _attend(rows.reshape(num_seqs * num_kv_heads, -1, head_dim), keys, values, tile, segment, weigh)
        found.append(out.view(rows.shape))
    whole = found[0] if len(found) == 1 else torch.cat(found, dim=2)
    return whole.transpose(1, 2).reshape(q.shape)


def _records(blocks: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Where each head's part of these blocks [num_seqs, n] lies among all such parts: [num_seqs * heads * n]."""
    heads = torch.arange(num_heads, device=blocks.device)
    return (blocks[:, None, :] * num_heads + heads[:, None]).flatten()


def _gather(cache: torch.Tensor, records: torch.Tensor, num_seqs: int) -> torch.Tensor:
    """[num_blocks, heads, block_size, dim] at n blocks of each sequence -> [num_seqs * heads, n * block_size, dim]."""
    num_heads, block_size, head_dim = cache.shape[1:]
    gathered = cache.view(-1, block_size * head_dim).index_select(0, records)
    return gathered.view(num_seqs * num_heads, -1, head_dim)


def _attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tile: QueryTile, segment: Segment,
    weigh: Weigh,
) -> torch.Tensor:  # fmt: skip
    """One query tile. queries: [batch, rows, head_dim] -> the same shape; keys, values: of the whole segment."""
    num_rows, num_padded = queries.shape[1], tile.mask.shape[2]
    if num_padded > num_rows:
        queries = F.pad(queries, (0, 0, 0, num_padded - num_rows))
    scores = multiply(queries, keys[..., tile.keys], segment.row_tile).float()
    masked = scores.view(segment.num_seqs, -1, *scores.shape[1:])[..., scores.shape[2] - tile.mask.shape[3] :]
    masked.masked_fill_(tile.mask, float("-inf"))
    out = weigh(scores, values[:, tile.keys], segment.key_tile, segment.row_tile)
    return out[:, :num_rows]


def weigh_by_tiles(scores: torch.Tensor, values: torch.Tensor, tile: int, row_tile: int | None) -> torch.Tensor:
    """softmax(scores) @ values, the sums tile by tile in order of position. scores: [batch, rows, keys] float32."""
    batch, rows, num_keys = scores.shape
    weights = scores.sub_(scores.amax(dim=-1, keepdim=True)).exp_()
    # cumsum adds in order, so tiles of zeros before and after change nothing
    total = weights.view(batch, rows, num_keys // tile, tile).sum(-1).cumsum(-1)[..., -1:]
    out = multiply(weights[..., :tile].to(values.dtype), values[:, :tile], row_tile).float()
    for start in range(tile, num_keys, tile):
        part = slice(start, start + tile)
        out += multiply(weights[..., part].to(values.dtype), values[:, part], row_tile).float()
    return (out / total).to(values.dtype)


def multiply(a: torch.Tensor, b: torch.Tensor, row_tile: int | None) -> torch.Tensor:
    """[batch, rows, inner] @ [batch, inner, outer], at most `row_tile` rows at a time."""
    if row_tile is None or a.shape[1] <= row_tile:
        return torch.bmm(a, b)
    return torch.cat([torch.bmm(part, b) for part in a.split(row_tile, dim=1)], dim=1)
