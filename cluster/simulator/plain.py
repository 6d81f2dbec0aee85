"""Plain tokens and a pool without bytes: for long simulations, in which times count and tokens do not.

The tokens depend on the seed of the request and on their index alone, so nothing checks that KV got where it is needed;
the model of modelled steps (steps.py) is for that.
"""

from __future__ import annotations

from collections.abc import Sequence as BlockIds
from functools import cache

from engine.layer_groups import LayersStored
from engine.planes import CacheLayout, Group, Plane, Split
from engine.scheduler import Batch
from engine.types import Request, Sampled

FIRST_TOKEN = 16  # ids below are left to special tokens, which would end a sequence
_STRIDE = 7919  # between the first tokens of two seeds


def plain_layout(block_size: int) -> CacheLayout:
    """One plane of one byte per token."""
    return CacheLayout((Plane("kv", 1, block_size, (1, block_size), "uint8", Split.HEADS),), block_size, (Group((0,)),))


class PlainPool:
    """Implements engine.pool.BlockBytes: all records are zeros, whatever was written."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size

    def read(self, plane: int, layers: range, block_ids: BlockIds[int]) -> bytes:
        return bytes(len(layers) * len(block_ids) * self._block_size)

    def write(self, plane: int, layers: range, block_ids: BlockIds[int], payload: memoryview) -> None:
        assert payload.nbytes == len(layers) * len(block_ids) * self._block_size


class PlainTokens:
    """Implements engine.engine.ModelRunner."""

    def __init__(self, vocab_size: int) -> None:
        self._ids = _ids_below(vocab_size)

    def execute(self, batch: Batch, stored: LayersStored | None = None) -> list[Sampled]:
        """There is nothing to store."""
        return [
            Sampled(self.tokens(first, index, 1), siblings=tuple(Sampled(self.tokens(one, index, 1)) for one in others))
            if item.samples
            else Sampled()
            for item in batch.scheduled
            for index in [item.sequence.num_generated]
            for first, *others in [item.sequence.answers]
        ]

    def tokens(self, request: Request, first_index: int, count: int) -> tuple[int, ...]:
        """The generated tokens of these indices."""
        sampling, num_ids = request.sampling, len(self._ids)
        start = (_STRIDE * (sampling.seed + sampling.choice) + first_index) % num_ids
        found = self._ids[start : start + count]
        while len(found) < count:
            found += self._ids[: count - len(found)]
        return found


@cache
def _ids_below(vocab_size: int) -> tuple[int, ...]:
    """One for all workers."""
    return tuple(range(FIRST_TOKEN, vocab_size))
