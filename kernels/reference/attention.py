"""Paged attention, causal, grouped-query: queries of one or many sequences over KV that lies in blocks.

The order of additions for a query depends only on its own position, so results are equal bit for bit for any
chunking, batch and block placement: keys are taken in tiles of KV_TILE positions from 0; a tile past the query's
position adds exact zeros; row counts come from a RowLadder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.reference.ladder import RowLadder

KV_TILE = 128  # positions; block tables are padded to whole tiles


@dataclass(frozen=True, slots=True)
class Segment:
    """Sequences with equally many new tokens. Built once per step, used by every layer that sees as far back.

    rows: which rows of the step's tokens, [num_seqs * num_new], sequence by sequence
    blocks: [num_seqs, num_blocks] int64, whole tiles, padded with any valid id
    mask: [num_seqs, 1, padded_rows, num_keys] True where a query must not look; rows are (token, group) pairs
    stale_from: first key that is unused in any sequence; stale: [num_seqs, 1, num_keys - stale_from, 1]
    row_tile: most rows of one product, where the machine needs a fixed count (RowLadder.tile)
    """

    num_seqs: int
    num_new: int
    rows: slice
    blocks: torch.Tensor
    mask: torch.Tensor
    stale_from: int
    stale: torch.Tensor
    row_tile: int | None


def tile_tokens(block_size: int) -> int:
    """Positions per key tile: the least multiple of the block size that is at least KV_TILE."""
    return -(-KV_TILE // block_size) * block_size


def first_key(position: int, window: int | None, block_size: int) -> int:
    """Where the keys of a query at `position` begin: the start of the tile with the first one that it sees."""
    tile = tile_tokens(block_size)
    return 0 if window is None else max(0, position - window + 1) // tile * tile


def make_segment(
    rows: slice, positions: torch.Tensor, blocks: torch.Tensor, num_tokens: list[int], groups: int,
    block_size: int, ladder: RowLadder, window: int | None = None,
) -> Segment:  # fmt: skip
    """positions: [num_seqs, num_new] of the new tokens, rising; num_tokens: stored positions of each after the step;
    blocks: of each sequence from `first_key` of its first new token on. A query sees `window` positions, its own
    included (None: all up to its own)."""
    num_seqs, num_new = positions.shape
    num_keys = blocks.shape[1] * block_size
    assert num_keys % tile_tokens(block_size) == 0, "block tables must be padded to whole tiles"
    keys = torch.arange(num_keys, device=positions.device).expand(num_seqs, -1)
    lengths = torch.tensor(num_tokens, device=positions.device)[:, None]
    queries = positions.repeat_interleave(groups, dim=1)[..., None]  # [num_seqs, num_new * groups, 1]
    if window is None:
        stale_from = min(num_tokens)
        mask, stale = keys[:, None] > queries, keys >= lengths
    else:
        starts = [first_key(position, window, block_size) for position in positions[:, 0].tolist()]
        keys = keys + torch.tensor(starts, device=positions.device)[:, None]
        stale_from = 0
        mask = (keys[:, None] > queries) | (keys[:, None] <= queries - window)
        stale = (keys >= lengths) | (keys <= positions[:, :1] - window)
    padded = torch.zeros(num_seqs, ladder.pad(num_new * groups), num_keys, dtype=torch.bool, device=positions.device)
    padded[:, : mask.shape[1]] = mask
    stale = stale[:, None, stale_from:, None]
    return Segment(num_seqs, num_new, rows, blocks, padded[:, None], stale_from, stale, ladder.tile)


def paged_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, segment: Segment, scale: float
) -> torch.Tensor:
    """q: [num_seqs * num_new, num_heads, head_dim]; caches: [num_blocks, num_kv_heads, block_size, head_dim].

    Returns the shape of q. Unused cache slots may hold anything, NaN included.
    """
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = k_cache.shape[1]
    batch = segment.num_seqs * num_kv_heads
    queries = _group_queries(q * scale, segment, num_kv_heads)  # [batch, padded_rows, head_dim]
    keys = _gather(k_cache, segment.blocks)  # [batch, num_keys, head_dim]
    values = _gather(v_cache, segment.blocks)
    stale = values.view(segment.num_seqs, num_kv_heads, -1, head_dim)[:, :, segment.stale_from :]
    stale.masked_fill_(segment.stale, 0)  # 0 * NaN would be NaN
    scores = _multiply(queries, keys.transpose(1, 2), segment.row_tile).float()
    scores.view(segment.num_seqs, num_kv_heads, *scores.shape[1:]).masked_fill_(segment.mask, float("-inf"))
    weights = scores.sub_(scores.amax(dim=-1, keepdim=True)).exp_()
    out = _weigh_by_tiles(weights, values, tile_tokens(k_cache.shape[2]), segment.row_tile)
    rows = segment.num_new * (num_heads // num_kv_heads)
    out = out[:, :rows].reshape(segment.num_seqs, num_kv_heads, segment.num_new, -1, head_dim)
    assert out.shape[0] * out.shape[1] == batch
    return out.transpose(1, 2).reshape(q.shape).to(q.dtype)


def _group_queries(q: torch.Tensor, segment: Segment, num_kv_heads: int) -> torch.Tensor:
    """Queries that share a KV head side by side: [num_seqs * num_kv_heads, padded (num_new * groups), head_dim]."""
    head_dim = q.shape[-1]
    grouped = q.view(segment.num_seqs, segment.num_new, num_kv_heads, -1, head_dim).transpose(1, 2)
    rows = grouped.reshape(segment.num_seqs * num_kv_heads, -1, head_dim)
    padding = segment.mask.shape[2] - rows.shape[1]
    return torch.nn.functional.pad(rows, (0, 0, 0, padding)) if padding else rows


def _gather(cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """[num_blocks, heads, block_size, dim] at [num_seqs, n] -> [num_seqs * heads, n * block_size, dim]."""
    num_heads, block_size, head_dim = cache.shape[1:]
    heads = torch.arange(num_heads, device=blocks.device)
    records = (blocks[:, None, :] * num_heads + heads[:, None]).flatten()
    gathered = cache.view(-1, block_size * head_dim).index_select(0, records)
    return gathered.view(blocks.shape[0] * num_heads, -1, head_dim)


def _weigh_by_tiles(weights: torch.Tensor, values: torch.Tensor, tile: int, row_tile: int | None) -> torch.Tensor:
    """Softmax-weighted sum, tile by tile in order of position. weights: [batch, rows, keys], unnormalised, float32."""
    batch, rows, num_keys = weights.shape
    # cumsum adds in order, so tiles of zeros before and after change nothing
    total = weights.view(batch, rows, num_keys // tile, tile).sum(-1).cumsum(-1)[..., -1:]
    out = _multiply(weights[..., :tile].to(values.dtype), values[:, :tile], row_tile).float()
    for start in range(tile, num_keys, tile):
        part = slice(start, start + tile)
        out += _multiply(weights[..., part].to(values.dtype), values[:, part], row_tile).float()
    return out / total


def _multiply(a: torch.Tensor, b: torch.Tensor, row_tile: int | None) -> torch.Tensor:
    """[batch, rows, inner] @ [batch, inner, outer], at most `row_tile` rows at a time."""
    if row_tile is None or a.shape[1] <= row_tile:
        return torch.bmm(a, b)
    return torch.cat([torch.bmm(part, b) for part in a.split(row_tile, dim=1)], dim=1)
