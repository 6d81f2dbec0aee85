"""Planes and groups: what a KV block is made of, and where each byte of it lies in the pool.

1. A *group* is layers that share a block table: they see equally far back. All groups of a model have the same number
   of slots for layers, so that a block of any group has the same size and all share one pool and one free list. (A
   group may leave slots unused.)
2. A *plane* is one kind of state, of every slot. A pool stores it as `[slots, num_blocks, *block_shape]`, planes one
   after another: one slot of one plane is a run of equal-sized block records, the unit that transfer frames cut.

Block manager, transfer and offload know planes and groups, never models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Windows
from dataclasses import dataclass
from enum import StrEnum

# Raised by hand when bytes on the wire or in a block change (tests/kv_transfer guards it with golden bytes).
WIRE_VERSION = 4
# Raised by hand when tokens may change for equal weights (tests/oracle guards it with golden tokens).
NUMERICS_VERSION = 4

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}
MAX_GROUPS_OF_A_WINDOW = 8  # each costs a block table per sequence


class Split(StrEnum):
    """How ranks of a tensor-parallel worker share a plane."""

    HEADS = "heads"  # axis 0 of block_shape is cut
    REPLICATED = "replicated"  # every rank holds all of it


@dataclass(frozen=True, slots=True)
class Group:
    """Layers with one block table; layer_ids[slot] lies in that slot of every plane."""

    layer_ids: tuple[int, ...]
    window: int | None = None  # positions that a query sees, its own included; None: all up to its own


@dataclass(frozen=True, slots=True)
class Plane:
    """One kind of per-token state. block_shape is of one layer's block, e.g. (num_kv_heads, tokens, head_dim)."""

    name: str
    num_slots: int
    tokens_per_block: int
    block_shape: tuple[int, ...]
    dtype: str
    split: Split

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block in one slot."""
        size = DTYPE_BYTES[self.dtype]
        for extent in self.block_shape:
            size *= extent
        return size


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """All planes and groups of a model's cache, and the pool's geometry for `num_blocks` blocks."""

    planes: tuple[Plane, ...]
    block_size: int  # tokens per block
    groups: tuple[Group, ...]

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all planes and slots."""
        return sum(plane.bytes_per_block * plane.num_slots for plane in self.planes)

    @property
    def bytes_per_token(self) -> int:
        """KV of one token that all layers still see."""
        return self.bytes_per_block * len(self.groups) // self.block_size

    @property
    def num_slots(self) -> int:
        """Of every plane."""
        return max(plane.num_slots for plane in self.planes)

    def num_slots_stored(self, num_layers: int) -> int:
        """The first so many slots hold their bytes in every group once the first `num_layers` layers are computed."""
        counts = [sum(layer < num_layers for layer in group.layer_ids) for group in self.groups]
        return min(
            self.num_slots if count == len(group.layer_ids) else count
            for count, group in zip(counts, self.groups, strict=True)
        )

    def plane_offset(self, index: int, num_blocks: int) -> int:
        """Byte offset in the pool of the plane with this index."""
        return num_blocks * sum(plane.bytes_per_block * plane.num_slots for plane in self.planes[:index])

    def block_offset(self, plane_index: int, slot: int, block_id: int, num_blocks: int) -> int:
        """Byte offset in the pool of one block's record in one slot."""
        plane = self.planes[plane_index]
        record = slot * num_blocks + block_id
        return self.plane_offset(plane_index, num_blocks) + plane.bytes_per_block * record

    def places(self) -> dict[int, tuple[int, int]]:
        """(group, slot) of each layer."""
        return {
            layer: (index, slot)
            for index, group in enumerate(self.groups)
            for slot, layer in enumerate(group.layer_ids)
        }


def attention_layout(
    num_layers: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: str, windows: Windows[int | None] = ()
) -> CacheLayout:
    """Planes `k` and `v` of grouped-query attention, heads outermost so that a head slice is contiguous.

    `windows` has one entry for each layer (none: no layer has a window)."""
    groups = _group_layers(windows or [None] * num_layers)
    shape = (num_kv_heads, block_size, head_dim)
    num_slots = max(len(group.layer_ids) for group in groups)
    planes = tuple(Plane(name, num_slots, block_size, shape, dtype, Split.HEADS) for name in ("k", "v"))
    return CacheLayout(planes, block_size, groups)


def _group_layers(windows: Windows[int | None]) -> tuple[Group, ...]:
    """Layers of equal window, cut into runs as long as the rarest kind has layers."""
    kinds: dict[int | None, list[int]] = {}
    for layer, window in enumerate(windows):
        kinds.setdefault(window, []).append(layer)
    counts = [len(layers) for layers in kinds.values()]
    num_slots = max(min(counts), -(-max(counts) // MAX_GROUPS_OF_A_WINDOW))
    return tuple(
        Group(tuple(layers[start : start + num_slots]), window)
        for window, layers in kinds.items()
        for start in range(0, len(layers), num_slots)
    )


def layout_hash(layout: CacheLayout, model: str, revision: str) -> str:
    """The cohort: workers of unequal hash are never paired. A hash of 16 hex digits for each field, so that two can be
    told apart by name. Tensor-parallel sizes are none of them: a layout is of all ranks together."""
    parts = {
        "wire": WIRE_VERSION, "numerics": NUMERICS_VERSION, "model": model, "revision": revision,
        "block_size": layout.block_size, "dtype": [plane.dtype for plane in layout.planes],
        "planes": layout.planes, "groups": layout.groups,
    }  # fmt: skip
    return ",".join(f"{name}={_digest(value)}" for name, value in parts.items())


def cohort_difference(first: str, second: str) -> str:
    """Which fields of two layout hashes differ, by name."""
    mine, theirs = _fields(first), _fields(second)
    return ", ".join(name for name in mine | theirs if mine.get(name) != theirs.get(name))


def _fields(cohort: str) -> dict[str, str]:
    parts = (part.partition("=") for part in cohort.split(","))
    return {name: digest for name, _, digest in parts}


def _digest(value: object) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest()
