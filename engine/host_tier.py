"""The host tier: cold exact blocks that the pool gave up, kept by name in host memory or in a file.

1. `save` is called when the pool evicts a named block, before anything else is written to it;
2. a later prompt, or a preempted sequence, finds the name here and `load` writes the bytes to a fresh block;
3. beyond its byte budget the tier forgets the least recently used block.
It knows planes and names, never models. A file is unlinked at once, so nothing is left behind.
"""

from __future__ import annotations

import mmap
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ConfigError
from engine.planes import CacheLayout
from engine.pool import BlockBytes


@dataclass(frozen=True, slots=True)
class TierStats:
    """Blocks kept now, and since the start: looked up because the pool had them not, found, taken in."""

    num_blocks: int = 0
    num_queries: int = 0
    num_hits: int = 0
    num_saves: int = 0


class HostTier:
    """Implements engine.block_manager.ColdBlocks. Not thread-safe: its engine owns it."""

    def __init__(self, layout: CacheLayout, pool: BlockBytes, size_bytes: int, folder: Path | None = None) -> None:
        """At most `size_bytes`, in memory or in a file in `folder`. Raises ConfigError if not one block fits, or the
        folder cannot be written."""
        self._layout = layout
        self._pool = pool
        self._block_bytes = layout.bytes_per_block
        num_slots = size_bytes // self._block_bytes
        if num_slots < 1:
            raise ConfigError(
                f"host_tier_bytes is {size_bytes}, and one block has {self._block_bytes}",
                param="engine.host_tier_bytes",
            )
        self._memory = _map(num_slots * self._block_bytes, folder)
        self._free = list(reversed(range(num_slots)))
        self._slot_of: OrderedDict[bytes, int] = OrderedDict()  # least recently used first
        self._pinned: dict[bytes, None] = {}
        self._num_queries = self._num_hits = self._num_saves = 0

    def find(self, name: bytes) -> bool:
        """Is this block here? Asked once for each block that the pool does not have."""
        self._num_queries += 1
        return name in self._slot_of

    def has(self, name: bytes) -> bool:
        """The same, by someone who does not look for a block."""
        return name in self._slot_of

    @contextmanager
    def pinned(self, names: Iterable[bytes]) -> Iterator[None]:
        """What `save` takes in meanwhile displaces none of these."""
        self._pinned = dict.fromkeys(names)
        try:
            yield
        finally:
            self._pinned = {}

    def save(self, name: bytes, block_id: int) -> bytes | None:
        """Keep a block's bytes, unless all room is pinned. Returns the name that was forgotten for it, if one was."""
        if name in self._slot_of:
            self._slot_of.move_to_end(name)
            return None
        displaced = None if self._free else self._displaceable()
        if not self._free and displaced is None:
            return None
        slot = self._free.pop() if displaced is None else self._slot_of.pop(displaced)
        at = slot * self._block_bytes
        for index, plane in enumerate(self._layout.planes):
            record = self._pool.read(index, range(plane.num_slots), [block_id])
            self._memory[at : at + len(record)] = record
            at += len(record)
        self._slot_of[name] = slot
        self._num_saves += 1
        return displaced

    def load(self, name: bytes, block_id: int) -> None:
        """Write a kept block's bytes to a block of the pool. The name must be here."""
        self._slot_of.move_to_end(name)
        at = self._slot_of[name] * self._block_bytes
        for index, plane in enumerate(self._layout.planes):
            size = plane.bytes_per_block * plane.num_slots
            self._pool.write(index, range(plane.num_slots), [block_id], memoryview(self._memory[at : at + size]))
            at += size
        self._num_hits += 1

    def stats(self) -> TierStats:
        return TierStats(len(self._slot_of), self._num_queries, self._num_hits, self._num_saves)

    def _displaceable(self) -> bytes | None:
        return next((name for name in self._slot_of if name not in self._pinned), None)


def _map(size_bytes: int, folder: Path | None) -> mmap.mmap:
    """Memory, or an unlinked file; either takes pages only as they are written."""
    if folder is None:
        return mmap.mmap(-1, size_bytes)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(size_bytes)
            return mmap.mmap(file.fileno(), size_bytes)
    except OSError as error:
        raise ConfigError(f"host_tier_folder {folder}: {error.strerror}", param="engine.host_tier_folder") from error
