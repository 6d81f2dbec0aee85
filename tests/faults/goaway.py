"""The one hurt that gRPC does not survive: a GOAWAY whose code has no name.

A flipped bit makes a GOAWAY (type 7) of a PING (type 6), and an error code of the PING's random bytes. gRPC (1.85)
keeps a code's lowest byte, and where that names no error it aborts the process whose calls are open, from a thread of
its own. Here that is the process that runs the tests. A worker whose process dies is the subject of test_killed.py.

1. a `NamedCodes` reads what one connection brings, frame by frame, as gRPC will, whatever hurt it;
2. the code of each GOAWAY becomes one with a name; all other bytes stay.
"""

from __future__ import annotations

HEADER_BYTES = 9  # of a frame: length (3), type, flags, stream (4); RFC 9113, 4.1
GOAWAY = 7
LOWEST_BYTE = 7  # of the code, in a GOAWAY's payload: last stream (4), code (4)
LAST_NAMED = 0xC  # INADEQUATE_SECURITY, the last that gRPC knows


class NamedCodes:
    def __init__(self) -> None:
        self._header = bytearray()  # of the frame that is arriving
        self._num_read = 0  # bytes of its payload

    def __call__(self, data: bytes) -> bytes:
        """`data`: the next bytes of the connection."""
        named, at = bytearray(data), 0
        while at < len(named):
            if len(self._header) < HEADER_BYTES:
                part = named[at : at + HEADER_BYTES - len(self._header)]
                self._header += part
                at += len(part)
                continue
            at += self._read_payload(named, at)
        return bytes(named)

    def _read_payload(self, named: bytearray, start: int) -> int:
        """From `start` on, as far as it has arrived; returns how many bytes of it that are."""
        size = int.from_bytes(self._header[:3])
        num_bytes = min(size - self._num_read, len(named) - start)
        code_at = start + LOWEST_BYTE - self._num_read
        if self._header[3] == GOAWAY and start <= code_at < start + num_bytes:
            named[code_at] = min(named[code_at], LAST_NAMED)
        self._num_read += num_bytes
        if self._num_read == size:
            self._header.clear()
            self._num_read = 0
        return num_bytes
