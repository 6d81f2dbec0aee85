"""Block names: the chained names of a request's full blocks, as workers compute them (engine/prefix.py), for the index.

With layers in several groups they are those of the first group. A name is cut to what the index keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.prefix import TOKEN_BYTES, child_hash_of, root_hash, short_name, token_bytes


@dataclass(frozen=True, slots=True)
class Naming:
    """How workers name blocks of `block_size` tokens. `hash_key`: of prefix hashes; None: they cache no prefixes."""

    block_size: int = 16
    hash_key: bytes | None = None


UNNAMED = Naming()


@dataclass(slots=True, eq=False)
class BlockNames:
    """Of one request, as far as they were asked for."""

    naming: Naming
    namespace: str
    _names: list[int] = field(default_factory=list)
    _last: bytes = b""  # the whole name of the last one

    def of(self, token_ids: Sequence[int]) -> Sequence[int]:
        """One for each full block. What was named before is not looked at again: a request's tokens only grow."""
        size, key = self.naming.block_size, self.naming.hash_key
        if key is None:
            return ()
        named = len(self._names) * size
        if len(token_ids) - named < size:
            return self._names
        data, width = token_bytes(token_ids[named:]), size * TOKEN_BYTES
        for start in range(0, len(data) - width + 1, width):
            parent = self._last or root_hash(key, self.namespace)
            self._last = child_hash_of(key, parent, data[start : start + width])
            self._names.append(short_name(self._last))
        return self._names
