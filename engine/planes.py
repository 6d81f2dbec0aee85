"""Planes: what a KV block is made of, and where each byte of it lies in the pool.

Block manager, transfer and offload know planes, never models. A pool stores each plane as
`[num_layers, num_blocks, *block_shape]`, planes one after another, so that one layer of one plane is a run of
equal-sized block records: the unit that transfer frames cut.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum

# Raised by hand when bytes on the wire or in a block change (tests/kv_transfer guards it with golden bytes).
WIRE_VERSION = 1
# Raised by hand when tokens may change for equal weights (tests/oracle guards it with golden tokens).
NUMERICS_VERSION = 1

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}


class Split(StrEnum):
    """How ranks of a tensor-parallel worker share a plane."""

    HEADS = "heads"  # axis 0 of block_shape is cut
    REPLICATED = "replicated"  # every rank holds all of it


@dataclass(frozen=True, slots=True)
class Plane:
    """One kind of per-token state. block_shape is of one layer's block, e.g. (num_kv_heads, tokens, head_dim)."""

    name: str
    group: str  # planes of one group share a block table
    layer_ids: tuple[int, ...]
    tokens_per_block: int
    block_shape: tuple[int, ...]
    dtype: str
    split: Split

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block in one layer."""
        size = DTYPE_BYTES[self.dtype]
        for extent in self.block_shape:
            size *= extent
        return size


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """All planes of a model's cache, and the pool's geometry for `num_blocks` blocks."""

    planes: tuple[Plane, ...]
    block_size: int  # tokens per block

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all planes and layers."""
        return sum(plane.bytes_per_block * len(plane.layer_ids) for plane in self.planes)

    def plane_offset(self, index: int, num_blocks: int) -> int:
        """Byte offset in the pool of the plane with this index."""
        return num_blocks * sum(plane.bytes_per_block * len(plane.layer_ids) for plane in self.planes[:index])

    def block_offset(self, plane_index: int, layer_index: int, block_id: int, num_blocks: int) -> int:
        """Byte offset in the pool of one block of one layer (counted within the plane)."""
        plane = self.planes[plane_index]
        record = layer_index * num_blocks + block_id
        return self.plane_offset(plane_index, num_blocks) + plane.bytes_per_block * record


def attention_layout(num_layers: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: str) -> CacheLayout:
    """Planes `k` and `v` of grouped-query attention, heads outermost so that a head slice is contiguous."""
    layers = tuple(range(num_layers))
    shape = (num_kv_heads, block_size, head_dim)
    planes = tuple(Plane(name, "full", layers, block_size, shape, dtype, Split.HEADS) for name in ("k", "v"))
    return CacheLayout(planes, block_size)


def layout_hash(layout: CacheLayout, model: str, revision: str) -> str:
    """The cohort: workers of unequal hash are never paired (design: layout hash). 32 hex digits."""
    text = repr((WIRE_VERSION, NUMERICS_VERSION, model, revision, layout))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
