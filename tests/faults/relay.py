"""The relay: a TCP link of our own between a consumer and its producer's address, which can be made to fail.

1. `start` listens on a port that the system chooses; each connection to it opens one to the target;
2. every chunk of bytes that arrives passes `fault`, a record that may be replaced at any time by `set`; then, if it
   comes from the producer, what `amend` made for its connection;
3. `stop` resets what is open.
What comes from the producer is hurt, what goes to it is only delayed or swallowed. It knows nothing of what is carried.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

CHUNK_BYTES = 2**14
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to the bytes of a link. Offsets count from when the fault was set, over all connections."""

    delay_s: float = 0.0  # of each chunk, both ways
    swallows: bool = False  # half-open: the producer's bytes are lost for ever, and connections stay
    is_cut: bool = False  # open connections are reset, new ones too
    flip_every: int | None = None  # one bit of each so many bytes
    flip_once_at: int | None = None
    truncate_at: int | None = None  # after so many bytes the connection is closed, once
    reorders: bool = False  # neighbouring chunks change places
    duplicates: bool = False  # each chunk comes twice


HEALED = Fault()
Amendment = Callable[[bytes], bytes]  # the next bytes of a connection, hurt -> what the consumer gets


def as_it_is() -> Amendment:
    return lambda data: data


class Relay:
    def __init__(self, target: str, amend: Callable[[], Amendment] = as_it_is) -> None:
        """`target`: host:port."""
        host, port = target.rsplit(":", 1)
        self._target = (host, int(port))
        self._amend = amend
        self.fault = HEALED
        self.num_bytes = 0  # from the producer, since the fault was set
        self._pipes: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._server: asyncio.Server | None = None

    async def start(self) -> str:
        """The address to be used in place of the target's."""
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0, limit=CHUNK_BYTES)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        assert self._server is not None, "start comes first"
        self._server.close()
        self.reset()
        await asyncio.gather(*self._pipes, return_exceptions=True)

    def set(self, fault: Fault) -> None:
        self.fault, self.num_bytes = fault, 0
        if fault.is_cut:
            self.reset()

    def reset(self) -> None:
        """End the connections that are open; what comes after is of new ones."""
        for writer in list(self._pipes.values()):
            _abort(writer)

    # --- parts ---------------------------------------------------------------------------------------------

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self.fault.is_cut:
                raise ConnectionRefusedError
            back, out = await asyncio.open_connection(*self._target, limit=CHUNK_BYTES)
        except OSError:
            _abort(writer)
            return
        async with asyncio.TaskGroup() as pipes:
            for source, target, amend in ((reader, out, None), (back, writer, self._amend())):
                pipe = pipes.create_task(self._pipe(source, target, amend))
                self._pipes[pipe] = target
                pipe.add_done_callback(self._pipes.pop)

    async def _pipe(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, amend: Amendment | None) -> None:
        """Until one end closes; then the other one is closed. `amend`: of what may be hurt."""
        try:
            while chunk := await source.read(CHUNK_BYTES):
                if self.fault.delay_s:
                    await asyncio.sleep(self.fault.delay_s)
                if not await self._pass(chunk, source, target, amend):
                    break
        except OSError:
            pass
        finally:
            target.close()

    async def _pass(
        self, chunk: bytes, source: asyncio.StreamReader, target: asyncio.StreamWriter, amend: Amendment | None
    ) -> bool:
        """Whether the connection goes on."""
        fault = self.fault
        if amend is None:
            target.write(chunk)
            await target.drain()
            return True
        first, self.num_bytes = self.num_bytes, self.num_bytes + len(chunk)
        if fault.swallows:
            return True
        if fault.truncate_at is not None and first <= fault.truncate_at < self.num_bytes:
            target.write(amend(chunk[: fault.truncate_at - first]))
            return False
        if fault.reorders:
            following = await source.read(CHUNK_BYTES)
            self.num_bytes += len(following)
            chunk = following + chunk
        target.write(amend(_flipped(chunk, first, fault) * (2 if fault.duplicates else 1)))
        await target.drain()
        return True


def _flipped(chunk: bytes, first: int, fault: Fault) -> bytes:
    """`first`: the number of the chunk's first byte."""
    hurt = bytearray(chunk)
    if fault.flip_every is not None:
        for at in range(-first % fault.flip_every, len(hurt), fault.flip_every):
            hurt[at] ^= 1
    if fault.flip_once_at is not None and first <= fault.flip_once_at < first + len(hurt):
        hurt[fault.flip_once_at - first] ^= 1
    return bytes(hurt)


def _abort(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()


@asynccontextmanager
async def relay_to(target: str, amend: Callable[[], Amendment] = as_it_is) -> AsyncIterator[tuple[Relay, str]]:
    """A relay, and its address."""
    relay = Relay(target, amend)
    address = await relay.start()
    try:
        yield relay, address
    finally:
        await relay.stop()
