"""A porter as its worker sees it: one child process, its links, and the deadlines that it keeps.

1. `start` starts the child and waits until it is ready;
2. `open_link` begins a link; what is told of it, sent over it and arrives by it goes through its LinkEnd;
3. a porter that does not answer, or leaves a send or a farewell undone for `timeout_s`, is killed. However it ends, its
   links end with it, and all who wait on them hear of it;
4. `stop` ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
import os
import socket
import subprocess
import sys
from collections.abc import Callable

from engine.child import child_env, end_child
from engine.errors import TransferFailed
from engine.pool import BlockBytes, SharedPool
from engine.rank_pools import RankPools, pools_of
from kv_transfer.carriers.distributed.link_end import LinkEnd
from kv_transfer.carriers.distributed.pipe import packed, read_record
from kv_transfer.carriers.distributed.records import (
    MAX_LINKS,
    NUM_SLOTS,
    Arrived,
    Close,
    Ended,
    Free,
    Keys,
    Open,
    Opened,
    Order,
    Ping,
    Pong,
    PorterSetup,
    Ready,
    Said,
    Send,
    Sent,
    Told,
)

START_TIMEOUT_S = 60.0  # torch is loaded meanwhile
MAX_UNSENT = 4  # bursts that a link's porter has been told to send
CHECKS = 4  # in each timeout_s

log = logging.getLogger(__name__)


class PorterProcess:
    def __init__(
        self, setup: PorterSetup, process: subprocess.Popen[bytes], ring: mmap.mmap, reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter, on_end: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.setup = setup
        self._process = process
        self._ring = memoryview(ring)
        self._reader = reader
        self._writer = writer
        self._on_end = on_end
        self._links: dict[str, LinkEnd] = {}
        self._read_on: list[LinkEnd] = []  # that have ended, while pulls still read what has arrived
        self._pinged_at: float | None = None
        self._verdict: str | None = None  # why it was killed
        self.has_ended = False
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def start(
        cls, setup: PorterSetup, pool: BlockBytes, sample_fd: int, on_end: Callable[[str], None]
    ) -> PorterProcess:
        """`on_end` is told once, and why, when it has ended without `stop`. Raises TransferFailed if it does not
        start."""
        ring_fd = os.memfd_create("steelyard-ring")
        try:
            os.ftruncate(ring_fd, setup.ring_bytes)
            ring = mmap.mmap(ring_fd, setup.ring_bytes)
            pools = pools_of(pool) if isinstance(pool, SharedPool | RankPools) else ()
            process, ours = await asyncio.to_thread(_spawn, [ring_fd, sample_fd, *(one.fd for one in pools)])
        except (OSError, ValueError) as error:
            raise TransferFailed(f"a porter process could not be started: {error}") from None
        finally:
            os.close(ring_fd)
        reader, writer = await asyncio.open_connection(sock=ours)
        porter = cls(setup, process, ring, reader, writer, on_end)
        try:
            await porter._hand_over()
        except BaseException:
            await porter.stop()
            raise
        return porter

    @property
    def pid(self) -> int:
        return self._process.pid

    # --- links ---------------------------------------------------------------------------------------------

    def open_link(self, name: str, token: bytes, is_producer: bool, keys: Keys = ()) -> LinkEnd:
        """Raises TransferFailed if there are too many."""
        self._read_on = [end for end in self._read_on if end.arrivals]
        taken = [end.row for end in (*self._links.values(), *self._read_on)]
        if name in self._links or len(taken) >= MAX_LINKS:
            raise TransferFailed(f"the porter has {len(taken)} links already")
        loop = asyncio.get_running_loop()
        row = None if is_producer else next(row for row in range(MAX_LINKS) if row not in taken)
        end = self._links[name] = LinkEnd(name, row, loop.create_future(), loop.create_future())
        self._write(Open(name, token, row, keys))
        return end

    def link(self, name: str) -> LinkEnd:
        """Of which we are the producer. Raises TransferFailed if there is none."""
        end = self._links.get(name)
        if end is None or end.row is not None:
            raise TransferFailed("there is no such link")
        return end

    def tell(self, end: LinkEnd, keys: Keys) -> None:
        self._write(Told(end.name, keys))

    async def send(self, end: LinkEnd, order: Send) -> None:
        """Returns when it may be sent soon. Raises TransferFailed when the link has ended."""
        while end.reason is None and len(end.unsent) >= MAX_UNSENT:
            await end.news.wait()  # at the latest when the porter is killed
        if end.reason is not None:
            raise TransferFailed(f"the link between the porters is over: {end.reason}")
        end.unsent.append(_now())
        self._write(order)
        with contextlib.suppress(OSError):  # it has ended, and its links with it
            await self._writer.drain()

    def arrived(self, end: LinkEnd, slot: int, size_bytes: int) -> memoryview:
        """What has arrived there, until it is freed."""
        assert end.row is not None, "frames arrive at the consumer's end"
        start = (end.row * NUM_SLOTS + slot) * self.setup.slot_bytes
        return self._ring[start : start + size_bytes]

    def free(self, end: LinkEnd, one: Arrived) -> None:
        self._write(Free(end.name, one.slots))

    def close_link(self, end: LinkEnd) -> None:
        """Say farewell. Closing one that has ended is no error."""
        if end.reason is None and end.closing_since is None:
            end.closing_since = _now()
            self._write(Close(end.name))

    # --- life ----------------------------------------------------------------------------------------------

    async def stop(self) -> None:
        self._on_end = _nobody
        await end_child(self._process, self._writer)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._end_all("its porter was stopped")

    async def _hand_over(self) -> None:
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                self._write(self.setup)
                ready = await read_record(self._reader)
        except (EOFError, OSError, TimeoutError):
            raise TransferFailed(f"the porter process {self.pid} did not start") from None
        assert isinstance(ready, Ready)
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._listen()), loop.create_task(self._watch())]

    async def _listen(self) -> None:
        try:
            while True:
                self._take(await read_record(self._reader))
        except (EOFError, OSError):
            self._writer.close()
            await asyncio.to_thread(self._process.wait)
            reason = f"the porter process {self.pid} {self._verdict or 'ended by itself'}"
            self._end_all(reason)
            self._on_end(reason)

    def _take(self, news: object) -> None:
        if isinstance(news, Pong):
            self._pinged_at = None
            return
        assert isinstance(news, Said | Opened | Sent | Arrived | Ended)
        end = self._links.get(news.link)
        if end is None:
            return
        match news:
            case Said(keys=keys) if not end.said.done():
                end.said.set_result(keys)
            case Opened():
                end.opened.set_result(None)
            case Sent():
                end.unsent.popleft()
                end.wake()
            case Arrived(pull=pull) if pull in end.arrivals:
                end.arrivals[pull].put_nowait(news)
            case Arrived():  # nobody waits for it any more
                self.free(end, news)
            case Ended(reason=reason):
                self._read_on.append(self._links.pop(end.name))
                end.end(reason)

    def _end_all(self, reason: str) -> None:
        self.has_ended = True
        for end in self._links.values():
            end.end(reason)
        self._links.clear()

    async def _watch(self) -> None:
        pause_s = self.setup.timeout_s / CHECKS
        while True:
            await asyncio.sleep(pause_s)
            limit = _now() - self.setup.timeout_s
            if self._fault(limit) is not None:
                await asyncio.sleep(pause_s)  # what has come while we were busy ourselves is read first
            self._verdict = self._fault(limit)
            if self._verdict is not None:
                log.warning("the porter process %d %s", self.pid, self._verdict)
                self._process.kill()  # which works on a stopped one too
                return
            if self._pinged_at is None:
                self._pinged_at = _now()
                self._write(Ping())

    def _fault(self, limit: float) -> str | None:
        """Why it is to be killed, if something has waited since before `limit`."""
        if self._pinged_at is not None and self._pinged_at < limit:
            return "did not answer in time and was killed"
        if any(end.unsent and end.unsent[0] < limit for end in self._links.values()):
            return "did not end a send in time and was killed"
        if any(end.closing_since is not None and end.closing_since < limit for end in self._links.values()):
            return "did not end a link in time and was killed"
        return None

    def _write(self, record: Order | PorterSetup) -> None:
        self._writer.write(packed(record))


def _spawn(fds: list[int]) -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair()
    with theirs:
        fds = [theirs.fileno(), *fds]
        command = [sys.executable, "-m", "kv_transfer.carriers.distributed.porter", *map(str, fds)]
        return subprocess.Popen(command, pass_fds=fds, env=child_env(1)), ours


def _nobody(_: str) -> None:
    return


def _now() -> float:
    return asyncio.get_running_loop().time()
