"""A mailbox: a queue without bounds and with one reader, for the many messages of a long simulation."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Mailbox(Generic[Item]):
    def __init__(self) -> None:
        self._items: deque[Item] = deque()
        self._reader: asyncio.Future[None] | None = None  # who waits, until something has come

    def put(self, item: Item) -> None:
        self._items.append(item)
        if self._reader is not None:
            if not self._reader.done():
                self._reader.set_result(None)
            self._reader = None

    async def get(self) -> Item:
        while not self._items:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        return self._items.popleft()

    def take_all(self) -> list[Item]:
        """What is there, without waiting."""
        items = list(self._items)
        self._items.clear()
        return items

    def __bool__(self) -> bool:
        """Is there anything?"""
        return bool(self._items)
