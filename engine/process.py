"""The engine's own process: `python -m engine.process SOCKET_FD POOL_FD`, started by ProcessStepRunner.

1. reads an EngineSetup from the socket; 2. loads the model over the shared pool and says so (None), or what failed
(ErrorInfo); 3. drives turns, commands from and outputs to the socket; 4. ends when the other end is closed, which
also happens when the parent dies.
"""

from __future__ import annotations

import contextlib
import pickle
import select
import signal
import socket
import sys

from engine.build import build_engine
from engine.errors import SteelyardError
from engine.pool import SharedPool
from engine.setup import EngineSetup
from engine.step_runner import LENGTH, drive
from engine.types import Command, ErrorInfo


class SocketInbox:
    """Commands from the parent. Implements engine.step_runner.Inbox."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def take(self, block: bool) -> list[Command] | None:
        taken: list[Command] = []
        try:
            while (block and not taken) or select.select([self._sock], [], [], 0)[0]:
                taken.append(self.read())
        except (EOFError, ConnectionError):
            return None
        return taken

    def read(self):
        (length,) = LENGTH.unpack(self._exactly(LENGTH.size))
        return pickle.loads(self._exactly(length))

    def write(self, record: object) -> None:
        data = pickle.dumps(record, protocol=pickle.HIGHEST_PROTOCOL)
        self._sock.sendall(LENGTH.pack(len(data)) + data)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self._sock.recv(size - len(data))
            if not part:
                raise EOFError
            data += part
        return data


def main(socket_fd: int, pool_fd: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches all; our parent decides
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        serve(SocketInbox(socket.socket(fileno=socket_fd)), pool_fd)


def serve(inbox: SocketInbox, pool_fd: int) -> None:
    setup: EngineSetup = inbox.read()
    try:
        pool = SharedPool(setup.layout, setup.spec.num_blocks, pool_fd)
        built = build_engine(setup, pool)
    except SteelyardError as error:
        inbox.write(ErrorInfo(error.code, error.message))
        return
    inbox.write(None)
    drive(built.engine, built.runner, inbox, inbox.write)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
