"""One HTTP connection of the gateway: uvicorn's, with bounds where uvicorn has none.

1. It is refused with 503 when `max_connections` are open.
2. Each request's head must be complete `read_timeout_s` after its first byte (the first one's: after the connection
   was made) and has at most MAX_HEAD_BYTES. Between requests uvicorn's own time-out closes it.
3. The body's time and size are the application's to bound (router/patience.py, router/body.py); what belongs to the
   body and is not content (chunk extensions, trailers) is bounded as a head is.
   A piece of a stream that need not wait can be written at once, past all that stands between (WRITE_NOW).
4. An answer waits in memory up to WRITE_BUFFER_BYTES; then its writer waits. The end of an answer of which nothing
   is taken for `write_timeout_s` is thrown away with the connection.
5. What is no HTTP gets a 400 in OpenAI's format and is closed.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import struct
from http import HTTPStatus
from typing import Any

from uvicorn import Config
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from cluster.turn_writer import Turn, TurnWriter
from engine.errors import InvalidRequest, SteelyardError, Unavailable
from router.config import RouterConfig
from router.errors import HeadTooLarge, error_reply
from router.patience import HANG_UP
from router.tap import WRITE_NOW

MAX_HEAD_BYTES = 64 * 2**10  # request line and headers; common servers take 8 to 64 KiB
WRITE_BUFFER_BYTES = 16 * 2**10  # some fifty events of a stream
MOST_PIECES = 64  # written at once in one turn, after which no write may have told that its client is behind
RETRY_AFTER_S = 1.0
AT_ONCE = struct.pack("ii", 1, 0)  # struct linger: on, for no time

log = logging.getLogger(__name__)


class Connection(HttpToolsProtocol):
    """uvicorn makes one per connection: functools.partial(Connection, bounds, turn) is its `http`."""

    def __init__(
        self, bounds: RouterConfig, turn: Turn, config: Config, server_state: ServerState, app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config, server_state, app_state, _loop)
        self._bounds = bounds
        self._turn = turn
        self._writer: TurnWriter | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._leftover_timer: asyncio.TimerHandle | None = None
        self._answering: RequestResponseCycle | None = None  # `cycle` is the newest, which may wait its turn
        self._head_bytes = 0  # of this message, trailers included
        self._unparsed_bytes = 0  # received since the parser last gave something out
        self._fault: SteelyardError | None = None

    # --- life ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:
        if len(self.connections) >= self._bounds.max_connections:
            log.warning("a connection was refused: %d are open, router.max_connections", len(self.connections))
            self.transport = transport
            self._answer(Unavailable("Too many connections", retry_after_s=RETRY_AFTER_S))
            return
        self._writer = TurnWriter(transport, self._turn)
        super().connection_made(self._writer)
        transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timers()
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True  # uvicorn tells the newest request only
            self._answering.message_event.set()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """A request that is not complete will never be answered; one that is gets the end of its answer."""
        if self.cycle is not None and self.cycle.more_body and not self.cycle.response_started:
            self.transport.close()
        else:
            super().shutdown()

    # --- what comes ----------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self._unparsed_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._unparsed_bytes > MAX_HEAD_BYTES:
            self._answer(_too_large())
        elif self._head_timer is None and self._is_between_requests:
            self._expect_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        self.scope["extensions"] = {HANG_UP: {"call": self._drop}, WRITE_NOW: {"line": self}}

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count_head(len(name) + len(value))

    def on_headers_complete(self) -> None:
        self._cancel_timers()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unparsed_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unparsed_bytes = 0
        super().on_message_complete()

    def _count_head(self, num_bytes: int) -> None:
        """Raises HeadTooLarge; the parser then takes the message for a broken one."""
        self._unparsed_bytes = 0
        self._head_bytes += num_bytes
        if self._head_bytes > MAX_HEAD_BYTES:
            self._fault = _too_large()
            raise self._fault

    # --- waits ---------------------------------------------------------------------------------------------

    @property
    def _is_between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(self._bounds.read_timeout_s, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        log.info("a connection was closed: no request came within %g s", self._bounds.read_timeout_s)
        self._close()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect_reader()

    def _expect_reader(self) -> None:
        """The end of an answer waits for its client: look again later whether some of it was taken."""
        if (size := self.transport.get_write_buffer_size()) and self._leftover_timer is None:
            self._leftover_timer = self.loop.call_later(self._bounds.write_timeout_s, self._look_at_reader, size)

    def _look_at_reader(self, size_before: int) -> None:
        self._leftover_timer = None
        if self.transport.get_write_buffer_size() < size_before:
            self._expect_reader()
            return
        log.warning("a connection was closed: its client took nothing for %g s", self._bounds.write_timeout_s)
        self._drop()

    def _drop(self) -> None:
        """Throw away what was not taken, in the kernel too, which would else hold it for a client that has stopped."""
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
        self.transport.abort()

    def _cancel_timers(self) -> None:
        for timer in (self._head_timer, self._leftover_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._leftover_timer = None

    # --- answers of its own --------------------------------------------------------------------------------

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def is_open(self) -> bool:
        """See router.tap.Line."""
        one, writer = self._answering, self._writer
        return (
            one is not None
            and writer is not None
            and len(writer.pieces) < MOST_PIECES
            and not self.flow.write_paused
            and one.chunked_encoding is True
            and not (one.response_complete or one.disconnected)
        )

    def write_now(self, body: bytes, /) -> None:
        """See router.tap.Line. One chunk, as uvicorn writes it."""
        self.transport.write(b"%x\r\n%b\r\n" % (len(body), body))

    def send_400_response(self, msg: str) -> None:
        self._answer(self._fault or InvalidRequest("This is not a valid HTTP/1.1 request"))

    def _answer(self, error: SteelyardError) -> None:
        """Write the error and close; but nothing is written into the midst of another answer."""
        one = self._answering
        if one is None or one.response_complete or not one.response_started:
            self.transport.write(_error_bytes(error))
        self._close()

    def _close(self) -> None:
        self.transport.close()
        self._expect_reader()


def _too_large() -> HeadTooLarge:
    return HeadTooLarge(f"The request's head has more than {MAX_HEAD_BYTES} bytes")


def _error_bytes(error: SteelyardError) -> bytes:
    body = error_reply(error).model_dump_json().encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body
