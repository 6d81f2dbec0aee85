"""The gateway's own HTTP server in front of a Generator that follows a script; and clients of raw bytes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from cluster.gateway import Server, server_config
from cluster.listener import listen
from router.api import Generator
from router.config import RouterConfig
from tests.router.fakes import PLAIN_STYLE, make_app

PATIENCE_S = 20.0  # of a client that waits for the server to do something; far more than any limit under test


@dataclass(frozen=True, slots=True)
class Served:
    server: Server
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def num_connections(self) -> int:
        return len(self.server.server_state.connections)


@asynccontextmanager
async def serve(generator: Generator, **settings: float) -> AsyncIterator[Served]:
    listener = listen("127.0.0.1", 0)
    server = Server(server_config(make_app(generator, PLAIN_STYLE, **settings), RouterConfig.model_validate(settings)))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield Served(server, listener.getsockname()[1])
    finally:
        server.should_exit = True
        await serving
        listener.close()


@asynccontextmanager
async def connect(port: int, receive_bytes: int | None = None) -> AsyncIterator[socket.socket]:
    """A non-blocking connection; `receive_bytes` is the size of its kernel's buffer."""
    with socket.socket() as client:
        if receive_bytes is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", port))
        yield client


async def send(client: socket.socket, data: bytes) -> bool:
    """Whether the server took it all: it may have closed the connection before."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.get_running_loop().sock_sendall(client, data)
    except OSError:
        return False
    return True


async def read_to_end(client: socket.socket) -> bytes:
    """All that the server sends until it closes. TimeoutError if it does not close."""
    loop, received = asyncio.get_running_loop(), bytearray()
    async with asyncio.timeout(PATIENCE_S):
        try:
            while chunk := await loop.sock_recv(client, 2**16):
                received += chunk
        except ConnectionError:
            pass  # it closed with some of our bytes unread
    return bytes(received)


async def read_until(client: socket.socket, mark: bytes) -> bytes:
    """What the server sends up to some bytes, and what came with them."""
    loop, received = asyncio.get_running_loop(), bytearray()
    async with asyncio.timeout(PATIENCE_S):
        while mark not in received:
            chunk = await loop.sock_recv(client, 2**16)
            assert chunk, f"closed after {bytes(received[-200:])!r}"
            received += chunk
    return bytes(received)


def post(path: str, body: bytes, *headers: str) -> bytes:
    """A whole request."""
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body
