"""A follower: the process of a rank other than the first, `python -m engine.follower SOCKET_FD POOL_FD`.

1. rank 0 starts it and sends its Order; 2. it loads its part of the model over its pool; 3. it computes each step that
it is told, beside the others; 4. it ends when rank 0 has closed the socket, which also happens when that process dies.
`FollowerProcesses` is rank 0's end. It finds out that a follower has died by its socket, also while all are idle.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
from dataclasses import dataclass

from engine.cores import claimed_cores
from engine.errors import WorkerLost
from engine.pool import SharedPool
from engine.ranks import GroupRanks, meeting_point
from engine.setup import EngineSetup
from engine.shares import Share, rank_layout
from engine.step_plan import StepPlan

LENGTH = struct.Struct("<I")
STOP_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True)
class Order:
    """What a follower is told at its start. Crosses a local pipe, never a network."""

    setup: EngineSetup
    share: Share
    port: int  # of the store at which the ranks meet, on loopback


class FollowerProcesses:
    """The other ranks of a worker, as rank 0 sees them. Implements engine.ranks.Followers."""

    def __init__(self, setup: EngineSetup, pool_fds: list[int], port: int) -> None:
        """Start one for each of these pools, which are those of ranks 1 and up."""
        size = len(pool_fds) + 1
        self.sockets: list[socket.socket] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        for rank, pool_fd in enumerate(pool_fds, start=1):
            self._start(Order(setup, Share(rank, size), port), pool_fd)

    def send(self, message: bytes) -> None:
        data = LENGTH.pack(len(message)) + message
        try:
            for sock in self.sockets:
                sock.sendall(data)
        except OSError as error:
            raise WorkerLost(f"a rank cannot be reached: {error}") from error

    def stop(self) -> None:
        """Closing the sockets ends them; if not in time, a signal does."""
        for sock in self.sockets:
            sock.close()
        for process in self._processes:
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start(self, order: Order, pool_fd: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            fds = (theirs.fileno(), pool_fd)
            command = [sys.executable, "-m", "engine.follower", *map(str, fds)]
            self._processes.append(subprocess.Popen(command, pass_fds=fds))
        self.sockets.append(ours)
        message = pickle.dumps(order, protocol=pickle.HIGHEST_PROTOCOL)
        ours.sendall(LENGTH.pack(len(message)) + message)


def main(socket_fd: int, pool_fd: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches all; rank 0's parent decides
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # rank 0 is gone
        follow(socket.socket(fileno=socket_fd), pool_fd)


def follow(sock: socket.socket, pool_fd: int) -> None:
    from engine.build import build_model_runner  # torch's models, which rank 0's end does not need from here
    from kernels.dispatch import pin_threads

    order: Order = pickle.loads(_message(sock))
    setup, share = order.setup, order.share
    pool = SharedPool(rank_layout(setup.layout, share), setup.spec.num_blocks, pool_fd)
    with claimed_cores(setup.config.cores, setup.config.threads) as cores:
        ranks = GroupRanks(share, meeting_point(order.port, share.size), setup.batch_invariant)
        runner = build_model_runner(setup, pool, ranks)
        pin_threads(runner.model.backend, cores)
        while True:
            runner.compute(StepPlan.decode(_message(sock)))


def _message(sock: socket.socket) -> bytes:
    """Raises EOFError when the other end is closed."""
    (length,) = LENGTH.unpack(_exactly(sock, LENGTH.size))
    return _exactly(sock, length)


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
    os._exit(0)  # torch's process group would wait for ranks that are gone
