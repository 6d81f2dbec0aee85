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
        await self._app(
            scope, self._bounded_receive(receive), self._bounded_send(scope, send, hang_up) if hang_up else send
        )

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

    def _bounded_send(self, scope: Scope, send: Send, hang_up: Callable[[], None]) -> Send:
        loop = asyncio.get_running_loop()

        def let_go() -> None:
            arrival = scope.get("state", {}).get("arrival")
            name = arrival.request_id if arrival is not None else "?"
            logger.warning("request %s: the client took nothing for %g s: let go", name, self._write_timeout_s)
            self._on_let_go()
            hang_up()

        async def send_in_time(message: Message) -> None:
            """Does not raise: once the connection is gone, `send` returns and the client counts as gone."""
            timer = loop.call_later(self._write_timeout_s, let_go)
            try:
                await send(message)
            finally:
                timer.cancel()

        return send_in_time
