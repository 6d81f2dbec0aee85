"""From a step's calls to the tasks of attention: which tile of queries sees which keys. Numbers only, no tensors.

A prompt's tiles are many and each sees its keys in one task. A few sequences that decode are few tiles over many keys:
these are cut, so that all of the device reads. Long tasks come first, so that the last to end are short.
"""

from __future__ import annotations

from collections.abc import Sequence as Calls
from dataclasses import dataclass

import numpy as np

from kernels.backend import Call
from kernels.reference.attention import first_key

FIELDS = 8  # of a task: row, tokens, position, first key, stop, table, part; of a merge: row, token, first part, stop
_ROW, _TOKENS, _POSITION, _FIRST, _STOP, _TABLE, _PART = range(7)


@dataclass(frozen=True, slots=True)
class Cut:
    """How tiles are made and cut.

    tile_tokens: most tokens of a tile; key_tile: keys of a tile of keys
    split: where tiles are cut, they are cut at multiples of this; 0: wherever shares of the device's programs become
        equal, but in pieces of `least` keys or more
    num_shares: how many tasks the device works on at once
    """

    tile_tokens: int
    key_tile: int
    split: int
    least: int
    num_shares: int


@dataclass(frozen=True, slots=True)
class TaskNumbers:
    """int32. tasks: [n, FIELDS]; merges: [m, FIELDS]; tables: block ids.

    num_parts: as many as tasks refer to; part_tokens: most tokens of a tile that was cut"""

    tasks: np.ndarray
    merges: np.ndarray
    tables: np.ndarray
    num_parts: int = 0
    part_tokens: int = 1

    @property
    def counts(self) -> np.ndarray:
        return np.array([len(self.tasks), len(self.merges)], np.int32)


def make_tasks(calls: Calls[Call], window: int | None, block_size: int, cut: Cut) -> TaskNumbers:
    """Of the layers of one group."""
    tiles, tables = _tiles(calls, window, block_size, cut)
    length = _length(tiles, cut)
    if length == 0:
        tiles[:, _PART] = -1
        return TaskNumbers(_longest_first(tiles), np.empty((0, FIELDS), np.int32), tables)
    begins = tiles[:, _FIRST] // length
    counts = (tiles[:, _STOP] - 1) // length - begins + 1
    tasks = np.repeat(tiles, counts, axis=0)
    ends = np.cumsum(counts)
    order = np.arange(len(tasks)) - np.repeat(ends - counts, counts)  # of a task among its tile's
    edges = (np.repeat(begins, counts) + order) * length
    tasks[:, _FIRST] = np.maximum(tasks[:, _FIRST], edges)
    tasks[:, _STOP] = np.minimum(tasks[:, _STOP], edges + length)
    is_cut = np.repeat(counts, counts) > 1
    tasks[:, _PART] = np.where(is_cut, np.cumsum(is_cut) - 1, -1)
    merges = _merges(tiles, counts)
    part_tokens = int(merges[:, 1].max(initial=0)) + 1
    return TaskNumbers(_longest_first(tasks), merges, tables, int(is_cut.sum()), part_tokens)


def most_parts(num_tiles: int, cut: Cut, max_context: int) -> int:
    """Of so many tiles, or fewer: where they are too many to be cut, fewer may not be."""
    if cut.split:
        return min(num_tiles, cut.num_shares // 2) * -(-max_context // cut.split)
    return 2 * num_tiles + cut.num_shares  # one more of each, for a window may begin anywhere


def _tiles(calls: Calls[Call], window: int | None, block_size: int, cut: Cut) -> tuple[np.ndarray, np.ndarray]:
    """[n, FIELDS] int32 without parts, and the tables."""
    found, tables, size = [np.empty((0, FIELDS), np.int32)], [np.empty(0, np.int32)], 0
    for call in calls:
        num_seqs, width = call.blocks.shape
        starts, each = np.array(call.starts), np.arange(num_seqs)
        firsts = np.array([first_key(start, window, block_size) for start in call.starts]) if window else 0 * starts
        per_seq = -(-call.num_new // cut.tile_tokens)
        token = np.tile(np.arange(per_seq) * cut.tile_tokens, num_seqs)
        seq = np.repeat(each, per_seq)
        tiles = np.zeros((len(seq), FIELDS), np.int64)
        tiles[:, _ROW] = call.rows.start + seq * call.num_new + token
        tiles[:, _TOKENS] = np.minimum(cut.tile_tokens, call.num_new - token)
        tiles[:, _POSITION] = starts[seq] + token
        if window is not None:
            tiles[:, _FIRST] = np.maximum(tiles[:, _POSITION] - window + 1, 0) // cut.key_tile * cut.key_tile
        tiles[:, _STOP] = tiles[:, _POSITION] + tiles[:, _TOKENS]
        tiles[:, _TABLE] = size + seq * width - firsts[seq] // block_size
        found.append(tiles.astype(np.int32))
        tables.append(call.blocks.ravel().astype(np.int32))
        size += call.blocks.size
    return np.concatenate(found), np.concatenate(tables)


def _length(tiles: np.ndarray, cut: Cut) -> int:
    """Keys of a task, a multiple of the key tile; 0: tiles are not cut."""
    num_keys = int((tiles[:, _STOP] - tiles[:, _FIRST]).sum())
    if 2 * len(tiles) > cut.num_shares or not num_keys:
        return 0
    if cut.split:
        return cut.split
    share = max(cut.least, -(-num_keys // cut.num_shares))
    return -(-share // cut.key_tile) * cut.key_tile


def _longest_first(tasks: np.ndarray) -> np.ndarray:
    lengths = tasks[:, _STOP] - tasks[:, _FIRST]
    return np.ascontiguousarray(tasks[np.argsort(-lengths, kind="stable")])


def _merges(tiles: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """One for each token of each tile that was cut."""
    is_cut = counts > 1
    stops = np.cumsum(np.where(is_cut, counts, 0))
    chosen, stops, counts = tiles[is_cut], stops[is_cut], counts[is_cut]
    tokens = chosen[:, _TOKENS]
    merges = np.zeros((int(tokens.sum()), FIELDS), np.int32)
    index = np.arange(len(merges)) - np.repeat(np.cumsum(tokens) - tokens, tokens)
    merges[:, 0] = np.repeat(chosen[:, _ROW], tokens) + index
    merges[:, 1] = index
    merges[:, 2] = np.repeat(stops - counts, tokens)
    merges[:, 3] = np.repeat(stops, tokens)
    return merges
