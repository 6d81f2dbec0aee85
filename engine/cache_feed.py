"""The cache feed: what one reader has not been told yet of what the prefix cache has.

1. `add` takes what has changed; a name that came and went meanwhile is told as it is at last;
2. `take` gives the next part, so that no message is large;
3. `renew` begins anew with all that there is: for a reader that has come again, or has fallen far behind.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from engine.types import CacheNews

MAX_NAMES = 4096  # in one message: 32 KiB
MAX_BEHIND = 2**16  # changes that wait for a reader, beside one for each name there is


class CacheFeed:
    def __init__(self) -> None:
        self._changes: dict[int, bool] = {}  # name: is it there?
        self._has_told = False
        self._anew = False

    def __bool__(self) -> bool:
        """Is there anything to tell?"""
        return bool(self._changes)

    def add(self, news: CacheNews, known: dict[int, None]) -> None:
        """`known`: all names, these changes included."""
        self._changes |= dict.fromkeys(news.kept, True) | dict.fromkeys(news.lost, False)
        if len(self._changes) > MAX_BEHIND + len(known):
            self.renew(known)

    def renew(self, known: Iterable[int]) -> None:
        self._changes = dict.fromkeys(known, True)
        self._anew = self._has_told

    def take(self) -> CacheNews:
        taken = list(islice(self._changes.items(), MAX_NAMES))
        for name, _ in taken:
            del self._changes[name]
        anew, self._anew = self._anew, False
        self._has_told = self._has_told or bool(taken)
        return CacheNews(
            tuple([name for name, is_there in taken if is_there]),
            tuple([name for name, is_there in taken if not is_there]),
            anew,
        )
