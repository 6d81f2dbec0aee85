"""Prompt names: the chained names of a prompt's full blocks, as workers compute them (engine/prefix.py), for the index.

With layers in several groups they are those of the first group. A name is cut to what the index keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.prefix import child_hash, root_hash, short_name


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What a gateway knows of the workers' engines, which are alike. `hash_key`: of prefix hashes."""

    block_size: int = 16  # tokens
    prefill_chunk: int = 256  # tokens
    hash_key: bytes = b""
    kv_blocks: bool = True  # are prefixes cached at all?


@dataclass(slots=True, eq=False)
class PromptNames:
    """Of one request: `names` as far as they are computed."""

    facts: EngineFacts
    namespace: str
    names: list[int] = field(default_factory=list)
    _last: bytes = b""

    def of(self, token_ids: Sequence[int]) -> list[int]:
        """One for each full block. What was named before is not looked at again: tokens are only added."""
        size, key = self.facts.block_size, self.facts.hash_key
        if not self.facts.kv_blocks:
            return []
        for index in range(len(self.names), len(token_ids) // size):
            parent = self._last or root_hash(key, self.namespace)
            self._last = child_hash(key, parent, token_ids[index * size : (index + 1) * size])
            self.names.append(short_name(self._last))
        return self.names
