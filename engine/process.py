"""The engine's own process: `python -m engine.process SOCKET_FD POOL_FD...`, started by ProcessStepRunner.

1. reads an EngineSetup from the socket; 2. with several ranks, one for each pool, starts those of the others
(engine/follower.py); 3. loads the model over the shared pool, measures a few steps (engine/calibration.py) and says
that it is ready (None), or what failed (ErrorInfo); 4. drives turns, commands from and outputs to the socket; 5. ends
when the other end is closed, which also happens when the parent dies, or when another rank has ended.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

from engine.build import build_model_runner, host_tier
from engine.calibration import calibrate
from engine.cores import claimed_cores
from engine.engine import Engine
from engine.errors import SteelyardError, WorkerLost
from engine.follower import FollowerProcesses
from engine.rank_pools import pools_of, worker_pool
from engine.ranks import ONE_RANK, GroupRanks, Ranks, meeting_point
from engine.setup import EngineSetup
from engine.shares import Share
from engine.step_runner import LENGTH, drive
from engine.types import Command, ErrorInfo
from kernels.dispatch import pin_threads


class SocketInbox:
    """Commands from the parent. Implements engine.step_runner.Inbox."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.followers: list[socket.socket] = []  # they say nothing: what can be read of one is its end

    def take(self, block: bool) -> list[Command] | None:
        """Raises WorkerLost when another rank has ended."""
        taken: list[Command] = []
        try:
            while self._has_news(wait=block and not taken):
                taken.append(self.read())
        except (EOFError, ConnectionError):
            return None
        return taken

    @property
    def has_news(self) -> bool:
        return self._has_news(wait=False)

    def _has_news(self, wait: bool) -> bool:
        ready, _, _ = select.select([self._sock, *self.followers], [], [], None if wait else 0)
        if self._sock not in ready and ready:
            raise WorkerLost("a rank has ended")
        return bool(ready)

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


def main(socket_fd: int, pool_fds: list[int]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches all; our parent decides
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        serve(SocketInbox(socket.socket(fileno=socket_fd)), pool_fds)


def serve(inbox: SocketInbox, pool_fds: list[int]) -> None:
    setup: EngineSetup = inbox.read()
    with ExitStack() as until_end:
        try:
            ranks = until_end.enter_context(_joined_ranks(setup, pool_fds, inbox))  # which claim cores of their own
            cores = until_end.enter_context(claimed_cores(setup.config.cores, setup.config.threads))
            pool = worker_pool(setup.layout, setup.spec.num_blocks, len(pool_fds), pool_fds)
            runner = build_model_runner(setup, pools_of(pool)[0], ranks)
            engine = Engine(setup.spec, host_tier(setup, pool))
        except SteelyardError as error:
            inbox.write(ErrorInfo(error.code, error.message))
            return
        pin_threads(runner.model.backend, cores)
        calibration = calibrate(setup.spec, runner, setup.config.calibrate_s, time.perf_counter)
        inbox.write(None)
        drive(engine, runner, inbox, inbox.write, calibration)


@contextlib.contextmanager
def _joined_ranks(setup: EngineSetup, pool_fds: list[int], inbox: SocketInbox) -> Iterator[Ranks]:
    """The other ranks run from here to the end. They meet at a store that only this host can reach."""
    size = len(pool_fds)
    if size == 1:
        yield ONE_RANK
        return
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    store = meeting_point(port, size, listener.detach())
    followers = FollowerProcesses(setup, pool_fds[1:], port)
    inbox.followers = followers.sockets
    try:
        yield GroupRanks(Share(0, size), store, setup.batch_invariant, followers)
    finally:
        followers.stop()


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), list(map(int, sys.argv[2:])))
    except WorkerLost as lost:
        print(f"the engine ends: {lost}", file=sys.stderr, flush=True)
        os._exit(1)  # torch's process group would wait for ranks that are gone
