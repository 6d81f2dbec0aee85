"""Bounded waits for a client: for its body, and for its taking what is sent.

1. A body that is not complete `read_timeout_s` after its head raises RequestTimeout where it is read.
2. A write that waits for `write_timeout_s`, because the client takes nothing of what came before, has its connection
   dropped. The server then tells that the client is gone, and the request ends as it does whenever a client leaves.

Only the server can drop a connection: it offers that in the scope, as the ASGI extension HANG_UP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.config import RouterConfig
from router.errors import RequestTimeout

HANG_UP = "steelyard.hang_up"  # its "call" drops the connection at once, whatever is still to be sent

logger = logging.getLogger(__name__)


class Patience:
    """ASGI middleware, outside of all that reads or writes. `on_let_go` hears of each client that took nothing."""

    def __init__(self, app: ASGIApp, config: RouterConfig, on_let_go: Callable[[], None]) -> None:
        self._app = app
        self._read_timeout_s = config.read_timeout_s
        self._write_timeout_s = config.write_timeout_s
        self._on_let_go = on_let_go

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        hang_up = scope.get("extensions", {}).get(HANG_UP, {}).get("call")
        if hang_up is None:
            await self._app(scope, self._bounded_receive(receive), send)
            return
        watch = _Watch(send, self._write_timeout_s, lambda: self._let_go(scope, hang_up))
        try:
            await self._app(scope, self._bounded_receive(receive), watch.send)
        finally:
            watch.stop()

    def _bounded_receive(self, receive: Receive) -> Receive:
        deadline = asyncio.get_running_loop().time() + self._read_timeout_s
        is_complete = False

        async def receive_in_time() -> Message:
            nonlocal is_complete
            if is_complete:  # what is waited for now is the client's going away
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                words = f"The body did not arrive within {self._read_timeout_s:g} s"
                raise RequestTimeout(words) from None
            is_complete = not message.get("more_body", False)
            return message

        return receive_in_time

    def _let_go(self, scope: Scope, hang_up: Callable[[], None]) -> None:
        arrival = scope.get("state", {}).get("arrival")
        name = arrival.request_id if arrival is not None else "?"
        logger.warning("request %s: the client took nothing for %g s: let go", name, self._write_timeout_s)
        self._on_let_go()
        hang_up()


class _Watch:
    """Sends, and watches with one timer for all of an answer whether a write waits for too long: a timer for each of
    them costs more than most of them. After `let_go` `send` returns, and the client counts as gone."""

    def __init__(self, send: Send, timeout_s: float, let_go: Callable[[], None]) -> None:
        self._send = send
        self._timeout_s = timeout_s
        self._let_go = let_go
        self._loop = asyncio.get_running_loop()
        self._since: float | None = None  # when the write began that waits
        self._timer = self._loop.call_later(timeout_s, self._look)

    async def send(self, message: Message) -> None:
        self._since = self._loop.time()
        try:
            await self._send(message)
        finally:
            self._since = None

    def stop(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        now = self._loop.time()
        due = (now if self._since is None else self._since) + self._timeout_s
        if due <= now:
            self._let_go()
            due = now + self._timeout_s
        self._timer = self._loop.call_at(due, self._look)
