"""The block manager: every KV block is free, cached, or has named holders. Ids only; bytes live elsewhere.

A block's life:
1. free        in `_free`; its bytes mean nothing.
2. held        `allocate` names a holder; more may `share` it. Only a sole holder of an unnamed block may write.
3. named       `name` records the prefix hash of a full, exact block, which `match` then finds.
4. cached      its last holder frees it: still named, it waits in `_cached` from least to most recently used.
5. evicted     `allocate` finds `_free` empty and takes the least recently used; tails go before heads. Where there is a
               host tier (`cold`), the block's bytes are saved there under its name.

`take_changes` tells which names can be found now or no longer, for those who route by them. `num_leaked` is computed by
walking the held blocks against the live tables, never by counters.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping
from collections.abc import Sequence as BlockIds
from contextlib import AbstractContextManager
from enum import StrEnum
from typing import NamedTuple, Protocol

from engine.types import Key


class HolderKind(StrEnum):
    SEQUENCE = "sequence"  # waiting or running here
    HANDOFF = "handoff"  # computed here, to be pulled
    RESERVATION = "reservation"  # being written from outside
    COPY = "copy"  # source of a copy that the present step makes


class Holder(NamedTuple):
    """Who holds a block."""

    kind: HolderKind
    key: Key


class ColdBlocks(Protocol):
    """Where evicted blocks go (engine.host_tier). `save` and `load` move the bytes before they return."""

    def find(self, name: bytes) -> bool: ...

    def pinned(self, names: BlockIds[bytes]) -> AbstractContextManager[None]: ...

    def has(self, name: bytes) -> bool: ...

    def save(self, name: bytes, block_id: int) -> bytes | None: ...

    def load(self, name: bytes, block_id: int) -> None: ...


class BlockManager:
    """Allocates, shares, names, caches and evicts the blocks 0 to num_blocks - 1."""

    def __init__(self, num_blocks: int, cold: ColdBlocks | None = None) -> None:
        self.num_blocks = num_blocks
        self.cold = cold
        self._free: deque[int] = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # named, without holders; oldest first
        self._holders: dict[int, list[Holder]] = {}  # of each held block, one or more
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._changed: dict[bytes, None] = {}  # names that have come or gone since they were last asked for

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated at once: free or cached."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    def match(self, hashes: BlockIds[bytes]) -> list[int]:
        """The longest run of known blocks from the start of a hash chain."""
        found: list[int] = []
        for block_hash in hashes:
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def find(self, name: bytes) -> int | None:
        """The block of this name, if the pool has it."""
        return self._block_of.get(name)

    def is_known(self, name: bytes) -> bool:
        """Is it in the pool, or in the host tier?"""
        return name in self._block_of or (self.cold is not None and self.cold.find(name))

    def allocate(self, holder: Holder, count: int) -> list[int] | None:
        """`count` blocks that only `holder` holds, or None (and nothing taken) if there are not as many."""
        if count > self.num_available:
            return None
        taken = [self._take() for _ in range(count)]
        self._holders |= {block_id: [holder] for block_id in taken}
        return taken

    def share(self, holder: Holder, block_ids: BlockIds[int]) -> None:
        """Add a holder to held or cached blocks."""
        for block_id in block_ids:
            assert self._hash_of[block_id] is not None or block_id in self._holders, f"block {block_id} is free"
            self._cached.pop(block_id, None)
            self._holders.setdefault(block_id, []).append(holder)

    def free(self, holder: Holder, block_ids: BlockIds[int]) -> None:
        """Take the holder's name off these blocks (given in order of position; tails become the older)."""
        for block_id in reversed(block_ids):
            holders = self._holders[block_id]
            holders.remove(holder)
            if holders:
                continue
            del self._holders[block_id]
            if self._hash_of[block_id] is None:
                self._free.append(block_id)
            else:
                self._cached[block_id] = None

    def pass_on(self, old: Holder, new: Holder, block_ids: BlockIds[int]) -> None:
        """The same blocks under another name (a sequence becomes a hand-off, a reservation a sequence)."""
        for block_id in block_ids:
            holders = self._holders[block_id]
            holders[holders.index(old)] = new

    def name(self, block_id: int, block_hash: bytes) -> None:
        """Record that a held block stores exactly this prefix. A second block of the same name stays unnamed."""
        assert block_id in self._holders, f"block {block_id} has no holder"
        if self._hash_of[block_id] is None and block_hash not in self._block_of:
            self._hash_of[block_id] = block_hash
            self._block_of[block_hash] = block_id
            self._changed[block_hash] = None

    def take_changes(self) -> tuple[list[bytes], list[bytes]]:
        """The names that are known now, and those that are not any more, of all that have changed since the last call;
        what came and went is among the latter."""
        changed, self._changed = self._changed, {}
        kept, lost = list[bytes](), list[bytes]()
        for name in changed:
            is_here = name in self._block_of or (self.cold is not None and self.cold.has(name))
            (kept if is_here else lost).append(name)
        return kept, lost

    def is_writable(self, block_id: int) -> bool:
        """May its sole holder write it? Otherwise the block must be copied first (copy-on-write). The source of a copy
        may be written: a step makes its copies before it writes anything."""
        writers = [holder for holder in self.holders(block_id) if holder.kind is not HolderKind.COPY]
        return len(writers) == 1 and self._hash_of[block_id] is None

    def holders(self, block_id: int) -> tuple[Holder, ...]:
        return tuple(self._holders.get(block_id, ()))

    def num_leaked(self, live: Mapping[Holder, BlockIds[int]]) -> int:
        """Blocks that are neither free, nor cached, nor in the table of each of their holders."""
        owned = {(holder, block_id) for holder, block_ids in live.items() for block_id in block_ids}
        num_disowned = sum(
            any((holder, block_id) not in owned for holder in holders) for block_id, holders in self._holders.items()
        )
        return num_disowned + abs(self.num_blocks - len(self._free) - len(self._cached) - len(self._holders))

    def _take(self) -> int:
        if self._free:
            return self._free.popleft()
        block_id, _ = self._cached.popitem(last=False)
        block_hash = self._hash_of[block_id]
        assert block_hash is not None
        displaced = self.cold.save(block_hash, block_id) if self.cold is not None else None
        self._changed |= dict.fromkeys((block_hash,) if displaced is None else (block_hash, displaced))
        del self._block_of[block_hash]
        self._hash_of[block_id] = None
        return block_id
