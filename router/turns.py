"""Turns: on which worker the cache of an earlier request lies, so that the next turn's prefill can fetch it from there.

A sequence is remembered by chained hashes of its chunks, when its answer ends; a prompt finds the longest beginning
that it shares with one. It is a hint: the worker may have evicted it meanwhile, and says so.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from zlib import crc32

from router.live import Name

CHUNK = 64  # tokens
MOST_CHUNKS = 2**16  # remembered: of 4 million tokens
MOST_WORKERS = 4  # of each


class Turns:
    def __init__(self) -> None:
        self._workers: OrderedDict[int, tuple[Name, ...]] = OrderedDict()  # by hash, the least recently used first

    def remember(self, namespace: str, tokens: Sequence[int], worker: Name) -> None:
        """This worker has just had all of it."""
        for link in _chain(namespace, tokens):
            others = [one for one in self._workers.get(link, ()) if one != worker]
            self._workers[link] = (worker, *others[: MOST_WORKERS - 1])
            self._workers.move_to_end(link)
        while len(self._workers) > MOST_CHUNKS:
            self._workers.popitem(last=False)

    def find(self, namespace: str, tokens: Sequence[int], first: Name) -> Name | None:
        """Who had more of its beginning than the worker that is to compute it: the longest, and that last. None if
        nobody had."""
        found: Name | None = None
        for link in _chain(namespace, tokens):
            workers = self._workers.get(link, ())
            if not workers:
                break
            found = None if first in workers else workers[0]
        return found


def _chain(namespace: str, tokens: Sequence[int]) -> Iterator[int]:
    """One for each full chunk: of all tokens up to its end. Hashes of integers are the same in every process."""
    link = crc32(namespace.encode())
    for start in range(0, len(tokens) - CHUNK + 1, CHUNK):
        link = hash((link, *tokens[start : start + CHUNK]))
        yield link
