"""The porter, a child of one worker: `python -m kv_transfer.carriers.distributed.porter SOCKET RING SAMPLE POOL...`,
each a descriptor.

1. reads a PorterSetup from the socket, maps the worker's pools and sample to read them, and the ring for what arrives;
2. says Ready, and obeys orders until the socket is closed, which also happens when the worker dies;
3. ends at once, whatever its links are waiting for. Loads torch.
"""

from __future__ import annotations

import mmap
import os
import signal
import socket
import sys
import threading
import warnings

import torch

from engine.pool import SharedPool, records_in_place
from engine.rank_pools import RankPools, worker_pool
from kv_transfer.carriers.distributed.links import ReceivingLink, SendingLink
from kv_transfer.carriers.distributed.pipe import PorterPipe
from kv_transfer.carriers.distributed.records import (
    NUM_SLOTS,
    Close,
    Ended,
    Free,
    News,
    Open,
    Outgoing,
    Payload,
    Ping,
    Pong,
    PorterSetup,
    Ready,
    SamplePart,
    Send,
    Told,
)
from kv_transfer.frames import HEADER_BYTES


class Memory:
    """What a porter has mapped."""

    def __init__(self, setup: PorterSetup, ring_fd: int, sample_fd: int, pool_fds: list[int]) -> None:
        ring = mmap.mmap(ring_fd, setup.ring_bytes)
        self.rows = torch.frombuffer(ring, dtype=torch.uint8).view(-1, NUM_SLOTS, setup.slot_bytes)
        self._sample = mmap.mmap(sample_fd, os.fstat(sample_fd).st_size, access=mmap.ACCESS_READ)
        self._pool: SharedPool | RankPools | None = None
        if pool_fds:
            self._pool = worker_pool(setup.layout, setup.num_blocks, len(pool_fds), pool_fds, mmap.ACCESS_READ)

    def frame(self, one: Outgoing) -> tuple[bytes, torch.Tensor]:
        """Its header, and its payload: where that lies, if it is in one run."""
        if isinstance(one, SamplePart):
            part = memoryview(self._sample)[one.where.start : one.where.stop]
            return bytes(HEADER_BYTES), torch.frombuffer(part, dtype=torch.uint8)
        if isinstance(one, Payload):
            return one.header, torch.frombuffer(one.payload, dtype=torch.uint8)
        assert self._pool is not None, "records are sent out of mapped pools only"
        pool, where = self._pool, (one.plane, one.layers, one.block_ids)
        pieces = list(records_in_place(pool, *where)) if isinstance(pool, SharedPool) else []
        run = pieces[0] if len(pieces) == 1 else pool.read(*where)
        return one.header, torch.frombuffer(run, dtype=torch.uint8)


class Porter:
    def __init__(self, pipe: PorterPipe, setup: PorterSetup, memory: Memory) -> None:
        self._pipe = pipe
        self._setup = setup
        self._memory = memory
        self._sending: dict[str, SendingLink] = {}
        self._receiving: dict[str, ReceivingLink] = {}

    def serve(self) -> None:
        """Raises EOFError or OSError when the worker is gone."""
        self._pipe.write(Ready())
        while True:
            self._obey(self._pipe.read())

    def _obey(self, order: object) -> None:
        match order:
            case Send(link=name) if name in self._sending:
                self._sending[name].send(order)
            case Free(link=name, slots=slots) if name in self._receiving:
                self._receiving[name].free(slots)
            case Close(link=name) if name in self._receiving:
                self._receiving[name].close()
            case Told(link=name, keys=keys) if name in self._receiving:
                self._receiving[name].told(keys)
            case Open():
                self._open(order)
            case Ping():
                self._pipe.write(Pong())
            case _:
                pass  # about a link that has just ended

    def _open(self, order: Open) -> None:
        if order.row is None:
            link = SendingLink(order, self._setup, self._emit, self._memory.frame)
            self._sending[order.link] = link
        else:
            link = ReceivingLink(order, self._setup, self._emit, self._memory.rows[order.row])
            self._receiving[order.link] = link
        link.start()

    def _emit(self, news: News) -> None:
        """From the links' threads."""
        if isinstance(news, Ended):
            self._sending.pop(news.link, None)
            self._receiving.pop(news.link, None)
        self._pipe.write(news)


def end_at_once(fault: threading.ExceptHookArgs) -> None:
    """A thread that fails may leave a link open that nobody serves: the worker has to see that all are over."""
    sys.__excepthook__(fault.exc_type, fault.exc_value or fault.exc_type(), fault.exc_traceback)
    os._exit(1)


def main(socket_fd: int, ring_fd: int, sample_fd: int, pool_fds: list[int]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches all; our parent decides
    warnings.filterwarnings("ignore", "The given buffer is not writable")  # nor is it written to
    threading.excepthook = end_at_once
    torch.set_num_threads(1)
    pipe = PorterPipe(socket.socket(fileno=socket_fd))
    setup = pipe.read()
    assert isinstance(setup, PorterSetup)
    Porter(pipe, setup, Memory(setup, ring_fd, sample_fd, pool_fds)).serve()


if __name__ == "__main__":
    try:
        main(*map(int, sys.argv[1:4]), pool_fds=list(map(int, sys.argv[4:])))
    except (EOFError, OSError):
        os._exit(0)  # links may wait for what never comes
