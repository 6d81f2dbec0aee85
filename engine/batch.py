"""A step's tensors: from a Batch of scheduled sequences to what a model reads."""

from __future__ import annotations

from collections.abc import Sequence as Groups
from dataclasses import dataclass, replace

import torch

from engine.block_table import BlockTable
from engine.planes import Group
from engine.scheduler import Batch, Scheduled
from kernels.dispatch import query_tile
from kernels.reference.attention import Segment, first_key, make_segment, tile_tokens
from kernels.reference.ladder import Ladders, RowLadder


@dataclass(frozen=True, slots=True)
class GroupInput:
    """Where the layers of one group store and read. block_ids: [num_tokens] of each new token's KV; segments: the
    attention calls that cover rows 0 to num_tokens."""

    block_ids: torch.Tensor
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class StepInput:
    """What a model's forward takes.

    token_ids, positions: [padded_rows]; rows beyond num_tokens are padding
    offsets: [num_tokens] where in its block each new token's KV goes
    groups: one for each group of the cache's layout
    sample_rows: [padded samples] rows whose logits are wanted; the first num_samples count. An item that samples has
        one row, its last; one that wants its prompt's logprobs has all its rows (num_rows_of)
    """

    num_tokens: int
    token_ids: torch.Tensor
    positions: torch.Tensor
    offsets: torch.Tensor
    groups: tuple[GroupInput, ...]
    sample_rows: torch.Tensor
    num_samples: int


def num_rows_of(item: Scheduled) -> int:
    """How many of an item's rows need logits: all where its prompt's logprobs are wanted and not all known, else the
    last if it samples."""
    sequence = item.sequence
    wants_prompt = sequence.request.sampling.prompt_logprobs >= 0 and sequence.num_generated == 0
    return item.num_new if wants_prompt else int(item.samples)


def build_input(
    batch: Batch, groups: Groups[Group], block_size: int, heads_per_kv: int, ladders: Ladders, device: str
) -> StepInput:
    """Lay out a batch: sequences with one new token first, bucketed by context length, then chunks."""
    items = sorted(batch.scheduled, key=lambda item: (item.num_new > 1, _num_tiles(item, block_size)))
    rows = _RowBuilder(block_size)
    buckets = _bucket(items, block_size)
    starts: list[int] = []
    for bucket in buckets:
        starts.append(rows.count)
        for item in bucket:
            rows.add(item)
    make = _SegmentMaker(block_size, heads_per_kv, ladders.attention, device)
    spans = [_span(bucket, start) for bucket, start in zip(buckets, starts, strict=True)]
    samples = [row for item in batch.scheduled for row in rows.sample_rows(item)]
    ladder = ladders.linear
    padded = ladder.pad(rows.count)
    return StepInput(
        num_tokens=rows.count,
        token_ids=_pad(rows.token_ids, padded, device),
        positions=_pad(rows.positions, padded, device),
        offsets=torch.tensor([position % block_size for position in rows.positions], device=device),
        groups=tuple(
            GroupInput(
                torch.tensor(_new_blocks(items, index, block_size), device=device),
                tuple(make.segment(span, index, group.window) for span in spans),
            )
            for index, group in enumerate(groups)
        ),
        sample_rows=_pad(samples, ladder.pad(len(samples)) if samples else 0, device),
        num_samples=len(samples),
    )


class _RowBuilder:
    """Flattens scheduled items into rows."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.token_ids: list[int] = []
        self.positions: list[int] = []
        self.last_row: dict[int, int] = {}

    @property
    def count(self) -> int:
        return len(self.token_ids)

    def add(self, item: Scheduled) -> None:
        stop = item.start + item.num_new
        self.token_ids += item.sequence.tokens[item.start : stop]
        self.positions += range(item.start, stop)
        self.last_row[id(item)] = self.count - 1

    def sample_rows(self, item: Scheduled) -> range:
        stop = self.last_row[id(item)] + 1
        return range(stop - num_rows_of(item), stop)


def _new_blocks(items: list[Scheduled], group: int, block_size: int) -> list[int]:
    """The block of each new position, in the order of the rows."""
    return [
        item.sequence.tables[group][position // block_size]
        for item in items
        for position in range(item.start, item.start + item.num_new)
    ]


def _num_tiles(item: Scheduled, block_size: int) -> int:
    return -(-(item.start + item.num_new) // tile_tokens(block_size))


def _bucket(items: list[Scheduled], block_size: int) -> list[list[Scheduled]]:
    """Single-token items whose contexts are within a factor of two share one attention call; chunks go alone."""
    buckets: list[list[Scheduled]] = []
    for item in items:
        if buckets and _fits(item, buckets[-1][0], block_size):
            buckets[-1].append(item)
        else:
            buckets.append([item])
    return buckets


def _fits(item: Scheduled, head: Scheduled, block_size: int) -> bool:
    single = head.num_new == item.num_new == 1
    return single and _num_tiles(item, block_size) <= 2 * _num_tiles(head, block_size)


@dataclass(frozen=True, slots=True)
class _Span:
    """One attention call: all new tokens, equally many, of each item."""

    items: tuple[Scheduled, ...]
    count: int
    rows: slice

    @property
    def starts(self) -> list[int]:
        return [item.start for item in self.items]


def _span(bucket: list[Scheduled], row: int) -> _Span:
    count = bucket[0].num_new
    return _Span(tuple(bucket), count, slice(row, row + count * len(bucket)))


class _SegmentMaker:
    """Segments of one step. Groups of one window differ in their blocks only, so masks are made once for all."""

    def __init__(self, block_size: int, heads_per_kv: int, ladder: RowLadder, device: str) -> None:
        self._block_size = block_size
        self._heads_per_kv = heads_per_kv
        self._ladder = ladder
        self._device = device
        self._made: dict[tuple[int, int | None], Segment] = {}

    def segment(self, span: _Span, group: int, window: int | None) -> Segment:
        blocks = self._blocks(span, group, window)
        made = self._made.get((span.rows.start, window))
        if made is not None:
            return replace(made, blocks=blocks)
        made = make_segment(
            span.rows, span.starts, span.count, blocks, self._heads_per_kv, self._block_size, self._ladder,
            query_tile(blocks.device), window,
        )  # fmt: skip
        self._made[(span.rows.start, window)] = made
        return made

    def _blocks(self, span: _Span, group: int, window: int | None) -> torch.Tensor:
        """[num_seqs, whole tiles of blocks]; places without a block of the sequence repeat one that it has."""
        tile, size = tile_tokens(self._block_size), self._block_size
        starts = [first_key(position, window, size) for position in span.starts]
        num_keys = max(first + span.count - start for first, start in zip(span.starts, starts, strict=True))
        width = -(-num_keys // tile) * tile // size
        tables = [item.sequence.tables[group] for item in span.items]
        rows = [_row(table, start // size, width) for table, start in zip(tables, starts, strict=True)]
        return torch.tensor(rows, device=self._device)


def _row(table: BlockTable, start: int, width: int) -> list[int]:
    missing = max(0, table.first - start)  # left the window of this group
    ids = table.ids[max(0, start - table.first) :][: width - missing]
    return [*table.ids[:1] * missing, *ids, *table.ids[:1] * (width - missing - len(ids))]


def _pad(values: list[int], length: int, device: str) -> torch.Tensor:
    return torch.tensor(values + [0] * (length - len(values)), dtype=torch.int64, device=device)
