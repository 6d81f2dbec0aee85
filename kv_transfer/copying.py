"""Copying a frame's records out of a producer's pool that is mapped here, whatever ranks either worker has."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as BlockIds

from engine.pool import PIECE_BYTES, BlockBytes, Buffer, SharedPool, copy_records
from engine.rank_pools import RankPools, pools_of
from kv_transfer.layout import Slice, plan_slices

Mapped = SharedPool | RankPools


def copy_frame(
    source: Mapped, target: BlockBytes, plane: int, layers: range, from_ids: BlockIds[int], to_ids: BlockIds[int]
) -> Iterator[Buffer]:
    """Copy records from pool to pool; yields what has arrived, in the order of `read`."""
    if isinstance(source, SharedPool) and isinstance(target, SharedPool):
        yield from copy_records(source, target, plane, layers, from_ids, to_ids)
    elif isinstance(target, SharedPool | RankPools):
        slices = plan_slices(source.layout.planes[plane], len(pools_of(source)), len(pools_of(target)))
        num_records = max(1, PIECE_BYTES // source.layout.planes[plane].bytes_per_block)
        for layer in layers:
            for start in range(0, len(from_ids), num_records):
                part = slice(start, start + num_records)
                _copy_slices(slices, source, target, plane, layer, list(from_ids[part]), list(to_ids[part]))
                yield target.read(plane, range(layer, layer + 1), to_ids[part])
    else:
        payload = source.read(plane, layers, from_ids)
        target.write(plane, layers, to_ids, memoryview(payload))
        yield payload


def _copy_slices(
    slices: tuple[Slice, ...], source: Mapped, target: Mapped, plane: int, layer: int, from_ids: list[int],
    to_ids: list[int],
) -> None:  # fmt: skip
    givers, takers = pools_of(source), pools_of(target)
    for one in slices:
        records = givers[one.source_rank].records(plane)[layer]
        taken = records[from_ids, one.source_start : one.source_start + one.size_bytes]
        where = slice(one.target_start, one.target_start + one.size_bytes)
        takers[one.target_rank].records(plane)[layer][to_ids, where] = taken
