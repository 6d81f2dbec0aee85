"""Several streams of outputs as one: what comes of any of them comes, and what fails one fails all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

Item = TypeVar("Item")


class _End:
    """One of them has nothing more."""


async def fan_in(streams: Sequence[AsyncGenerator[Item]]) -> AsyncGenerator[Item]:
    """Closing it closes all of them. What a slow reader has not taken waits in the streams."""
    news: asyncio.Queue[Item | Exception | _End] = asyncio.Queue(1)

    async def follow(stream: AsyncGenerator[Item]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    await news.put(item)
        except Exception as error:  # whatever it is, the reader gets it
            await news.put(error)
        else:
            await news.put(_End())

    tasks = [asyncio.get_running_loop().create_task(follow(stream)) for stream in streams]
    num_open = len(tasks)
    try:
        while num_open:
            item = await news.get()
            if isinstance(item, Exception):
                raise item
            if isinstance(item, _End):
                num_open -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
