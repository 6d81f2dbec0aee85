"""Layout plans: which bytes of a block's record go from which rank of one worker to which rank of another.

1. a rank stores its KV heads of a split plane (engine/shares.py) and all of a replicated one. Heads are outermost in a
   record, so a run of heads is a run of bytes, and scales in planes of their own are cut as the heads beside them;
2. each target rank gets each of its heads from one source rank that has it. Where several have, those that ask for it
   are spread over them, as they are over the copies of a replicated plane;
3. what lies side by side on both ends is one slice.
Pure: sizes in, slices out. The same for any two sizes, equal ones too.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.planes import CacheLayout, Plane, Split
from engine.shares import Share, holders, rank_plane


@dataclass(frozen=True, slots=True)
class Slice:
    """Bytes [source_start, source_start + size_bytes) of a record at the source, and where they go in the target's."""

    source_rank: int
    target_rank: int
    source_start: int
    target_start: int
    size_bytes: int


def plan_slices(plane: Plane, num_source: int, num_target: int) -> tuple[Slice, ...]:
    """Of one block's record in one slot, between workers of so many ranks."""
    return tuple(one for rank in range(num_target) for one in _slices_to(plane, Share(rank, num_target), num_source))


def planned_bytes(layout: CacheLayout, num_target: int) -> int:
    """Bytes that all slices of one block have together: what the target's ranks store of it. A head that several of
    them have goes to each."""
    return sum(
        rank_plane(plane, Share(rank, num_target)).bytes_per_block * plane.num_slots
        for plane in layout.planes
        for rank in range(num_target)
    )


def _slices_to(plane: Plane, target: Share, num_source: int) -> list[Slice]:
    if plane.split is Split.REPLICATED:
        return [Slice(target.rank * num_source // target.size, target.rank, 0, 0, plane.bytes_per_block)]
    num_heads = plane.block_shape[0]
    head_bytes = plane.bytes_per_block // num_heads
    mine, slices = target.kv_heads(num_heads), list[Slice]()
    for head in mine:
        source = Share(_source_of(head, num_heads, target, num_source), num_source)
        source_start = (head - source.kv_heads(num_heads).start) * head_bytes
        one = Slice(source.rank, target.rank, source_start, (head - mine.start) * head_bytes, head_bytes)
        slices[-1:] = _joined(slices[-1], one) if slices else [one]
    return slices


def _source_of(head: int, num_heads: int, target: Share, num_source: int) -> int:
    """Which of the source ranks that have a head gives it to this target."""
    givers, takers = holders(head, num_heads, num_source), holders(head, num_heads, target.size)
    return givers[(target.rank - takers.start) * len(givers) // len(takers)]


def _joined(last: Slice, one: Slice) -> list[Slice]:
    goes_on = last.source_rank == one.source_rank and last.source_start + last.size_bytes == one.source_start
    if not goes_on:
        return [last, one]
    size_bytes = last.size_bytes + one.size_bytes
    return [Slice(last.source_rank, last.target_rank, last.source_start, last.target_start, size_bytes)]
