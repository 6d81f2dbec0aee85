"""The door to the owner of live requests: open while the gateway serves, closed before it ends.

1. Open, it lets every request through to the Generator behind it.
2. `close` lets nobody in any more, and waits until all that are inside have left, or for `drain_s`.
What is still inside then is ended by the owner, with a typed error.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

from engine.errors import Unavailable
from engine.types import Request, TokenOutput
from router.api import Generator, HealthView

RETRY_AFTER_S = 1.0  # another gateway, or the next life of this one, may then answer


class Door:
    """Implements router.api.Generator."""

    def __init__(self, inner: Generator) -> None:
        self._inner = inner
        self._inside: dict[object, Request] = {}
        self._closing = False
        self._left = asyncio.Event()  # set whenever the last one leaves

    async def generate(self, request: Request, *siblings: Request) -> AsyncGenerator[TokenOutput]:
        """See router.api.Generator. Unavailable once it closes."""
        if self._closing:
            raise Unavailable("The gateway is shutting down", retry_after_s=RETRY_AFTER_S)
        ticket = object()
        self._inside[ticket] = request
        try:
            async with aclosing(self._inner.generate(request, *siblings)) as outputs:
                async for output in outputs:
                    yield output
        finally:
            del self._inside[ticket]
            if not self._inside:
                self._left.set()

    def cancel(self, request_id: str) -> None:
        self._inner.cancel(request_id)

    def tap(self, request_id: str, take: Callable[[TokenOutput], bool]) -> None:
        self._inner.tap(request_id, take)

    async def close(self, drain_s: float) -> int:
        """How many requests are still inside after `drain_s`. Takes no time when there are none."""
        self._closing = True
        self._left.clear()
        if self._inside:
            try:
                async with asyncio.timeout(drain_s):
                    await self._left.wait()
            except TimeoutError:
                pass  # the owner ends them
        return len(self._inside)

    def new_request_id(self) -> str:
        return self._inner.new_request_id()

    def new_seed(self) -> int:
        return self._inner.new_seed()

    def health(self) -> HealthView:
        view = self._inner.health()
        return replace(view, healthy=False, reason="shutting down") if self._closing else view
