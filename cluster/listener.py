"""The socket that a gateway takes connections from; several gateways of one machine may share its port.

The kernel then spreads new connections over those that listen, by a hash of both ends' addresses (SO_REUSEPORT, Linux's
socket(7)): evenly over many of them.
"""

from __future__ import annotations

import errno
import socket

from engine.errors import ConfigError

SEND_BUFFER_BYTES = 128 * 2**10  # what the kernel holds for a client that does not read; Linux doubles it
BACKLOG = 512


def listen(host: str, port: int) -> socket.socket:
    """`bind`, and take connections from now on."""
    listener = bind(host, port)
    listener.listen(BACKLOG)
    return listener


def require_free(host: str, port: int) -> None:
    """Raises ConfigError if anybody listens there, sharing or not: among those who share, nobody would be told."""
    bind(host, port).close()


def bind(host: str, port: int, *, is_shared: bool = False) -> socket.socket:
    """`port` 0: the system chooses. One that `is_shared` can be had by others of the same user who share it too; it
    gets no connections before it listens. Raises ConfigError if it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if is_shared:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)  # its connections inherit it
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        what = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
        raise ConfigError(f"router.port: {host}:{port} {what}", param="router.port") from None
    listener.setblocking(False)
    return listener
