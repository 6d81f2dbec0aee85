"""The simulated KV pool: real block records, of the model of modelled steps.

A token's state has 32 bytes. Planes `k` and `v` in two layers hold 8 of them each, so that a state is whole only where
every plane and layer of its block is the right one.
"""

from __future__ import annotations

from collections.abc import Sequence as BlockIds

from engine.block_table import BlockTable
from engine.planes import CacheLayout, attention_layout

NUM_LAYERS = 2
RECORD_BYTES = 8  # of one token in one layer of one plane
STATE_BYTES = 2 * NUM_LAYERS * RECORD_BYTES


def state_layout(block_size: int) -> CacheLayout:
    """One KV head of two float32: RECORD_BYTES per token."""
    return attention_layout(NUM_LAYERS, 1, 2, block_size, "float32")


class StatePool:
    """Implements engine.pool.BlockBytes; the modelled runner reads and writes single states."""

    def __init__(self, block_size: int, num_blocks: int) -> None:
        self._block_size = block_size
        self._block_bytes = block_size * RECORD_BYTES
        size_bytes = num_blocks * self._block_bytes
        self._planes = [[bytearray(size_bytes) for _ in range(NUM_LAYERS)] for _ in range(2)]
        self._lanes = [layer for plane in self._planes for layer in plane]

    # --- block records, for transfers ----------------------------------------------------------------------

    def read(self, plane: int, layers: range, block_ids: BlockIds[int]) -> bytes:
        size, lanes = self._block_bytes, self._planes[plane]
        return b"".join(lanes[layer][block * size : (block + 1) * size] for layer in layers for block in block_ids)

    def write(self, plane: int, layers: range, block_ids: BlockIds[int], payload: memoryview) -> None:
        size = self._block_bytes
        if len(payload) != len(layers) * len(block_ids) * size:
            shape = f"{len(layers)} x {len(block_ids)}"
            raise ValueError(f"payload of {len(payload)} bytes does not fit {shape} records of {size} bytes")
        records = ((layer, block) for layer in layers for block in block_ids)
        for index, (layer, block) in enumerate(records):
            self._planes[plane][layer][block * size : (block + 1) * size] = payload[index * size : (index + 1) * size]

    # --- states, for the modelled runner -------------------------------------------------------------------

    def state(self, blocks: BlockTable, position: int) -> bytes:
        offset = self._offset(blocks, position)
        return b"".join(lane[offset : offset + RECORD_BYTES] for lane in self._lanes)

    def store(self, blocks: BlockTable, position: int, state: bytes) -> None:
        offset = self._offset(blocks, position)
        for index, lane in enumerate(self._lanes):
            lane[offset : offset + RECORD_BYTES] = state[index * RECORD_BYTES : (index + 1) * RECORD_BYTES]

    def copy(self, source: int, target: int) -> None:
        """All records of one block to another."""
        size = self._block_bytes
        for lane in self._lanes:
            lane[target * size : (target + 1) * size] = lane[source * size : (source + 1) * size]

    def _offset(self, blocks: BlockTable, position: int) -> int:
        block, slot = divmod(position, self._block_size)
        return (blocks[block] * self._block_size + slot) * RECORD_BYTES
