"""Prefix hashes: the name of an exact block is a keyed hash of every token up to its end, and of its namespace.

Keyed blake2b, so that a tenant can neither forge nor probe another's blocks; the key derives from the cluster's
secret and is equal on all workers.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from collections.abc import Sequence as TokenSequence

HASH_BYTES = 16
TOKEN_BYTES = array("I").itemsize


def root_hash(key: bytes, namespace: str) -> bytes:
    """The parent of a namespace's first block."""
    return hashlib.blake2b(namespace.encode(), key=key, digest_size=HASH_BYTES, person=b"steelyard-root").digest()


def child_hash(key: bytes, parent: bytes, token_ids: TokenSequence[int]) -> bytes:
    """Hash of a full block with these tokens after the prefix that `parent` names."""
    return child_hash_of(key, parent, token_bytes(token_ids))


def child_hash_of(key: bytes, parent: bytes, data: bytes) -> bytes:
    """The same of a block's `token_bytes`."""
    return hashlib.blake2b(parent + data, key=key, digest_size=HASH_BYTES).digest()


def token_bytes(token_ids: TokenSequence[int]) -> bytes:
    """As they are hashed: TOKEN_BYTES each."""
    return array("I", token_ids).tobytes()


def extend_hashes(key: bytes, hashes: list[bytes], root: bytes, token_ids: TokenSequence[int], block_size: int) -> None:
    """Append to `hashes` the names of the full blocks of `token_ids` that it does not name yet."""
    for index in range(len(hashes), len(token_ids) // block_size):
        parent = hashes[-1] if hashes else root
        hashes.append(child_hash(key, parent, token_ids[index * block_size : (index + 1) * block_size]))


def group_name(block_hash: bytes, group: int) -> bytes:
    """The name of a group's block of this prefix: groups store different layers of the same tokens."""
    return block_hash + group.to_bytes(2, "little") if group else block_hash


def short_name(block_hash: bytes) -> int:
    """What travels to gateways, as a hint for placement: the first 8 bytes."""
    return int.from_bytes(block_hash[:8], "little")


def short_names(names: Iterable[bytes]) -> tuple[int, ...]:
    """Of the first group's blocks among these: the others' would say the same again."""
    return tuple([short_name(name) for name in names if len(name) == HASH_BYTES])
