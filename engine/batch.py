"""A step's tensors: from a Batch of scheduled sequences by way of its StepPlan to what a model reads."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Groups
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from engine.block_table import BlockTable
from engine.planes import Group
from engine.scheduler import Batch, Scheduled
from engine.step_plan import StepPlan
from engine.types import LAST, MEAN
from kernels.backend import Attention, Backend, Call, GroupCalls
from kernels.reference.attention import first_key, tile_tokens


@dataclass(frozen=True, slots=True)
class GroupInput:
    """Where the layers of one group store and read. block_ids: [num_tokens] of each new token's KV; plan: what their
    attention made of the calls that cover rows 0 to num_tokens."""

    block_ids: torch.Tensor
    plan: object


@dataclass(frozen=True, slots=True)
class StepInput:
    """What a model's forward takes.

    token_ids, positions: [padded_rows]; rows beyond num_tokens are padding
    offsets: [num_tokens] where in its block each new token's KV goes
    groups: one for each group of the cache's layout
    sample_rows: [padded samples] rows whose logits are wanted; the first num_samples count. An item that samples has
        one row, its last; one that wants its prompt's logprobs has all its rows (num_rows_of)
    state_rows: [num_states] rows whose final hidden states are wanted, for embeddings (num_states_of)
    """

    num_tokens: int
    token_ids: torch.Tensor
    positions: torch.Tensor
    offsets: torch.Tensor
    groups: tuple[GroupInput, ...]
    sample_rows: torch.Tensor
    num_samples: int
    state_rows: torch.Tensor


def num_rows_of(item: Scheduled) -> int:
    """How many of an item's rows need logits: all where its prompt's logprobs are wanted and not all known, else the
    last if it samples; none for an embedding."""
    sequence = item.sequence
    if sequence.request.sampling.embed:
        return 0
    wants_prompt = sequence.request.sampling.prompt_logprobs >= 0 and sequence.num_generated == 0
    return item.num_new if wants_prompt else int(item.samples)


def num_states_of(item: Scheduled) -> int:
    """How many of an item's rows an embedding is made of: all for the mean, else the last of its prompt."""
    embed = item.sequence.request.sampling.embed
    return item.num_new if embed == MEAN else int(item.samples) if embed == LAST else 0


def plan_step(batch: Batch, groups: Groups[Group], block_size: int) -> StepPlan:
    """Lay out a batch: sequences with one new token first, bucketed by context length, then chunks."""
    items = sorted(batch.scheduled, key=lambda item: (item.num_new > 1, _num_tiles(item, block_size)))
    rows, buckets = _RowBuilder(), _bucket(items, block_size)
    for item in items:
        rows.add(item)
    spans = [_Span.of(bucket) for bucket in buckets]
    tables = [
        row
        for index, group in enumerate(groups)
        for bucket, span in zip(buckets, spans, strict=True)
        for row in _tables(bucket, span, index, group.window, block_size)
    ]
    new_blocks = [block_id for group in range(len(groups)) for block_id in _new_blocks(items, group, block_size)]
    return StepPlan(
        token_ids=_numbers(rows.token_ids),
        positions=_numbers(rows.positions),
        new_blocks=_numbers(new_blocks),
        num_seqs=_numbers([len(bucket) for bucket in buckets]),
        num_new=_numbers([bucket[0].num_new for bucket in buckets]),
        starts=_numbers([item.start for item in items]),
        tables=_numbers(list(chain.from_iterable(tables))),
        sample_rows=_numbers([row for item in batch.scheduled for row in rows.last_rows(item, num_rows_of(item))]),
        state_rows=_numbers([row for item in batch.scheduled for row in rows.last_rows(item, num_states_of(item))]),
        copies=_numbers(list(chain.from_iterable(batch.copies))),
    )


def build_input(
    plan: StepPlan, groups: Groups[Group], block_size: int, backend: Backend, attention: Attention
) -> StepInput:
    """A plan's tensors, as this model's backend and attention want them."""
    num_samples = len(plan.sample_rows)
    padded = backend.pad(plan.num_tokens)
    plans = attention.plan(calls_of(plan, groups, block_size), block_size)
    token_ids, positions, offsets, sample_rows, state_rows, *new_blocks = backend.place([
        _pad(plan.token_ids, padded),
        _pad(plan.positions, padded),
        plan.positions % block_size,
        _pad(plan.sample_rows, backend.pad(num_samples)),
        plan.state_rows,
        *np.split(plan.new_blocks, len(groups)),
    ])  # fmt: skip
    inputs = tuple(GroupInput(block_ids, plan) for block_ids, plan in zip(new_blocks, plans, strict=True))
    return StepInput(
        plan.num_tokens, token_ids, positions, offsets, inputs, sample_rows, num_samples, state_rows
    )  # fmt: skip


class _RowBuilder:
    """Flattens scheduled items into rows."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.positions: list[int] = []
        self.last_row: dict[int, int] = {}

    def add(self, item: Scheduled) -> None:
        stop = item.start + item.num_new
        known = item.sequence.tokens[item.start : stop]
        self.token_ids += known + [0] * (item.num_new - len(known))  # the device has it (engine/ahead.py)
        self.positions += range(item.start, stop)
        self.last_row[id(item)] = len(self.token_ids) - 1

    def last_rows(self, item: Scheduled, count: int) -> range:
        stop = self.last_row[id(item)] + 1
        return range(stop - count, stop)


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
    """One attention call: all `num_new` tokens of each sequence, which begin at `starts`."""

    starts: tuple[int, ...]
    num_new: int

    @classmethod
    def of(cls, bucket: list[Scheduled]) -> _Span:
        return cls(tuple([item.start for item in bucket]), bucket[0].num_new)

    def first_keys(self, window: int | None, block_size: int) -> list[int]:
        return [first_key(position, window, block_size) for position in self.starts]

    def num_blocks(self, window: int | None, block_size: int) -> int:
        """Of each sequence's row of blocks: whole tiles that hold every key which a query sees."""
        tile, firsts = tile_tokens(block_size), self.first_keys(window, block_size)
        num_keys = max(start + self.num_new - first for start, first in zip(self.starts, firsts, strict=True))
        return -(-num_keys // tile) * tile // block_size


def _tables(
    bucket: list[Scheduled], span: _Span, group: int, window: int | None, block_size: int
) -> Iterator[list[int]]:
    """Of each sequence, whole tiles of blocks; places without a block of the sequence repeat one that it has."""
    width = span.num_blocks(window, block_size)
    for item, start in zip(bucket, span.first_keys(window, block_size), strict=True):
        yield _row(item.sequence.tables[group], start // block_size, width)


def _row(table: BlockTable, start: int, width: int) -> list[int]:
    missing = max(0, table.first - start)  # left the window of this group
    ids = table.ids[max(0, start - table.first) :][: width - missing]
    return [*table.ids[:1] * missing, *ids, *table.ids[:1] * (width - missing - len(ids))]


def calls_of(plan: StepPlan, groups: Groups[Group], block_size: int) -> list[GroupCalls]:
    """Of each group. The plan's tables hold one group after the other."""
    tables, found = plan.tables, list[GroupCalls]()
    for group in groups:
        row, calls = 0, list[Call]()
        for span in _spans(plan):
            width = span.num_blocks(group.window, block_size)
            taken, tables = np.split(tables, [len(span.starts) * width])
            stop = row + len(span.starts) * span.num_new
            calls.append(Call(slice(row, stop), span.starts, span.num_new, taken.reshape(-1, width)))
            row = stop
        found.append(GroupCalls(tuple(calls), group.window))
    return found


def _spans(plan: StepPlan) -> list[_Span]:
    starts, stops = plan.starts.tolist(), np.cumsum(plan.num_seqs).tolist()
    counts = zip([0, *stops], stops, plan.num_new.tolist(), strict=False)
    return [_Span(tuple(starts[begin:stop]), num_new) for begin, stop, num_new in counts]


def _numbers(values: list[int]) -> np.ndarray:
    return np.array(values, np.int64)


def _pad(values: np.ndarray, length: int) -> np.ndarray:
    padded = np.zeros(length, np.int64)
    padded[: len(values)] = values
    return padded
