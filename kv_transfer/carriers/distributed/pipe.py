"""The pipe between a worker and its porter: pickled records over a socket pair that nobody else can reach."""

from __future__ import annotations

import asyncio
import pickle
import socket
import struct
import threading

_LENGTH = struct.Struct("<I")


def packed(record: object) -> bytes:
    data = pickle.dumps(record, protocol=pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(data)) + data


async def read_record(reader: asyncio.StreamReader) -> object:
    """The worker's end. Raises EOFError or OSError once the porter is gone."""
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    return pickle.loads(await reader.readexactly(length))


class PorterPipe:
    """The porter's end. Records may be written from any thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._file = sock.makefile("rb")
        self._lock = threading.Lock()

    def read(self) -> object:
        """Raises EOFError or OSError once the worker is gone."""
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        return pickle.loads(self._exactly(length))

    def write(self, record: object) -> None:
        data = packed(record)
        with self._lock:
            self._sock.sendall(data)

    def _exactly(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) < size:
            raise EOFError
        return data
