"""A step's tensors: from a Batch of scheduled sequences to what a model reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.scheduler import Batch, Scheduled
from kernels.reference.attention import Segment, make_segment, tile_tokens
from kernels.reference.ladder import RowLadder

QUERY_TILE = 256  # most new tokens of one sequence in one attention call: bounds the score matrix


@dataclass(frozen=True, slots=True)
class StepInput:
    """What a model's forward takes.

    token_ids, positions: [padded_rows]; rows beyond num_tokens are padding
    block_ids, offsets: [num_tokens] where each new token's KV goes
    segments: the attention calls that cover rows 0 to num_tokens
    sample_rows: [padded samples] rows whose logits are wanted; the first num_samples count
    """

    num_tokens: int
    token_ids: torch.Tensor
    positions: torch.Tensor
    block_ids: torch.Tensor
    offsets: torch.Tensor
    segments: tuple[Segment, ...]
    sample_rows: torch.Tensor
    num_samples: int


def build_input(batch: Batch, block_size: int, groups: int, ladder: RowLadder, device: str) -> StepInput:
    """Lay out a batch: sequences with one new token first, bucketed by context length, then chunks."""
    items = sorted(batch.scheduled, key=lambda item: (item.num_new > 1, _num_tiles(item, block_size)))
    rows = _RowBuilder(block_size)
    segments: list[Segment] = []
    for group in _group(items, block_size):
        start = rows.count
        for item in group:
            rows.add(item)
        segments += _segments_of(group, start, block_size, groups, ladder, device)
    order = {id(item): index for index, item in enumerate(batch.scheduled)}
    samples = [rows.last_row[id(item)] for item in sorted(items, key=lambda item: order[id(item)]) if item.samples]
    padded = ladder.pad(rows.count)
    return StepInput(
        num_tokens=rows.count,
        token_ids=_pad(rows.token_ids, padded, device),
        positions=_pad(rows.positions, padded, device),
        block_ids=torch.tensor(rows.block_ids, device=device),
        offsets=torch.tensor(rows.offsets, device=device),
        segments=tuple(segments),
        sample_rows=_pad(samples, ladder.pad(len(samples)) if samples else 0, device),
        num_samples=len(samples),
    )


class _RowBuilder:
    """Flattens scheduled items into rows."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.token_ids: list[int] = []
        self.positions: list[int] = []
        self.block_ids: list[int] = []
        self.offsets: list[int] = []
        self.last_row: dict[int, int] = {}

    @property
    def count(self) -> int:
        return len(self.token_ids)

    def add(self, item: Scheduled) -> None:
        sequence, stop = item.sequence, item.start + item.num_new
        self.token_ids += sequence.tokens[item.start : stop]
        self.positions += range(item.start, stop)
        self.block_ids += [sequence.block_ids[position // self.block_size] for position in range(item.start, stop)]
        self.offsets += [position % self.block_size for position in range(item.start, stop)]
        self.last_row[id(item)] = self.count - 1


def _num_tiles(item: Scheduled, block_size: int) -> int:
    return -(-(item.start + item.num_new) // tile_tokens(block_size))


def _group(items: list[Scheduled], block_size: int) -> list[list[Scheduled]]:
    """Single-token items whose contexts are within a factor of two share one attention call; chunks go alone."""
    groups: list[list[Scheduled]] = []
    for item in items:
        if groups and _fits(item, groups[-1][0], block_size):
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def _fits(item: Scheduled, head: Scheduled, block_size: int) -> bool:
    single = head.num_new == item.num_new == 1
    return single and _num_tiles(item, block_size) <= 2 * _num_tiles(head, block_size)


def _segments_of(
    group: list[Scheduled], row: int, block_size: int, groups: int, ladder: RowLadder, device: str
) -> list[Segment]:
    num_new = group[0].num_new
    segments = []
    for first in range(0, num_new, QUERY_TILE):
        count = min(QUERY_TILE, num_new - first)
        stops = [item.start + first + count for item in group]
        positions = [range(stop - count, stop) for stop in stops]
        rows = slice(row + first, row + first + count * len(group))
        table = _block_table(group, max(stops), block_size, device)
        where = torch.tensor([list(span) for span in positions], device=device)
        segments.append(make_segment(rows, where, table, stops, groups, block_size, ladder))
    return segments


def _block_table(group: list[Scheduled], num_tokens: int, block_size: int, device: str) -> torch.Tensor:
    """[num_seqs, whole tiles of blocks]; entries past a sequence's own blocks repeat its first."""
    blocks_per_tile = tile_tokens(block_size) // block_size
    width = -(-num_tokens // tile_tokens(block_size)) * blocks_per_tile
    rows = [item.sequence.block_ids[:width] for item in group]
    return torch.tensor([ids + ids[:1] * (width - len(ids)) for ids in rows], device=device)


def _pad(values: list[int], length: int, device: str) -> torch.Tensor:
    return torch.tensor(values + [0] * (length - len(values)), dtype=torch.int64, device=device)
