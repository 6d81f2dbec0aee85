"""A transport whose writes leave together at the end of the loop's turn, each connection's as one.

When a step's tokens come, every stream of the gateway has something to send in the same turn. Sent one by one between
other work, each write wakes a client that has gone to sleep; sent in a row, most find it awake. No event is merged
with another, nor waits for longer than the turn. What waits counts as buffered; `close` sends it, `abort` drops it.
"""

from __future__ import annotations

import asyncio
from typing import Any


class Turn:
    """The writers of one loop that have something to send in this turn."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: list[TurnWriter] = []

    def add(self, writer: TurnWriter) -> None:
        if not self._waiting:
            self._loop.call_soon(self._flush)
        self._waiting.append(writer)

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        for writer in waiting:
            writer.flush()


class TurnWriter(asyncio.Transport):
    """In front of the loop's own transport, for a protocol that writes in small pieces."""

    def __init__(self, inner: asyncio.Transport, turn: Turn) -> None:
        super().__init__()
        self._inner = inner
        self._turn = turn
        self.pieces: list[bytes] = []  # of this turn

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self.pieces:
            self._turn.add(self)
        self.pieces.append(bytes(data))

    def flush(self) -> None:
        pieces, self.pieces = self.pieces, []
        if pieces and not self._inner.is_closing():
            self._inner.write(pieces[0] if len(pieces) == 1 else b"".join(pieces))

    def close(self) -> None:
        self.flush()
        self._inner.close()

    def abort(self) -> None:
        self.pieces = []
        self._inner.abort()

    def get_write_buffer_size(self) -> int:
        return self._inner.get_write_buffer_size() + sum(map(len, self.pieces))

    def is_closing(self) -> bool:
        return self._inner.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._inner.get_extra_info(name, default)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._inner.set_write_buffer_limits(high, low)

    def pause_reading(self) -> None:
        self._inner.pause_reading()

    def resume_reading(self) -> None:
        self._inner.resume_reading()

    def is_reading(self) -> bool:
        return self._inner.is_reading()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._inner.set_protocol(protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._inner.get_protocol()
