"""The door of a pool: lets other processes of the same host read one worker's pool, without a copy between; or the ring
through which it is read, where nobody can map the pool.

1. a reader connects to the abstract socket that carries the incarnation's name: only this host has it;
2. both show that they know the cluster's token, each by a MAC over both sides' nonces; the token never travels;
3. the reader gets the number of blocks, or of the ring's slots, and descriptors that it cannot write to: the pool (of
   each rank) or the ring, and a sample of bytes to measure the path with.
Who is another user, is silent for DOOR_TIMEOUT_S or shows a wrong MAC is sent away. Nothing is left on any disk.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import mmap
import os
import secrets
import socket
import struct
from contextlib import ExitStack
from dataclasses import dataclass

from engine.errors import TransferFailed
from engine.planes import CacheLayout
from engine.pool import SharedPool
from engine.rank_pools import RankPools, pools_of, worker_pool
from engine.ring import RingPool, StagingRing
from engine.shares import Share, rank_layout

DOOR_TIMEOUT_S = 2.0
MAX_WAITING = 64
ACCEPT_PAUSE_S = 1.0  # after a failure
NONCE_BYTES = MAC_BYTES = 32
_ANSWER = struct.Struct("<QQI")  # blocks of the pool, bytes of the sample, ranks; a ring: its slots, the same, 0
MAX_RANKS = 64
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OpenPool:
    """Another worker's pool or ring, mapped here to be read."""

    pool: SharedPool | RankPools | StagingRing
    sample: mmap.mmap

    def close(self) -> None:
        self.pool.close()
        self.sample.close()


class PoolDoor:
    """The producer's end, from when it is made until `close`."""

    def __init__(self, pool: SharedPool | RankPools | RingPool, sample_fd: int, token: str, incarnation: str) -> None:
        self._token = token.encode()
        sample_bytes = os.fstat(sample_fd).st_size
        if isinstance(pool, RingPool):
            self._answer = _ANSWER.pack(pool.ring.num_slots, sample_bytes, 0)
            shown = [pool.ring.fd]
        else:
            self._answer = _ANSWER.pack(pool.num_blocks, sample_bytes, len(pools_of(pool)))
            shown = [one.fd for one in pools_of(pool)]
        self._fds = [_read_only(fd) for fd in (*shown, sample_fd)]
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._listener.bind(_door_name(incarnation))
        self._listener.listen(MAX_WAITING)
        self._task = asyncio.get_running_loop().create_task(self._welcome(), name="door of the pool")

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._listener.close()
        for fd in self._fds:
            os.close(fd)

    async def _welcome(self) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as visits:
            while True:
                try:
                    visitor, _ = await loop.sock_accept(self._listener)
                except OSError as error:  # no descriptors are left, say: later ones may find some
                    log.warning("a reader of the pool could not be let in: %s", error)
                    await asyncio.sleep(ACCEPT_PAUSE_S)
                    continue
                visits.create_task(self._let_in(visitor))

    async def _let_in(self, visitor: socket.socket) -> None:
        with visitor:
            try:
                async with asyncio.timeout(DOOR_TIMEOUT_S):
                    await self._show_and_see(visitor)
                    socket.send_fds(visitor, [self._answer], self._fds)
            except (OSError, TransferFailed, TimeoutError) as error:
                log.warning("a reader of the pool was sent away: %s", error or "it was silent")

    async def _show_and_see(self, visitor: socket.socket) -> None:
        _check_user(visitor)
        theirs, ours = await _exactly(visitor, NONCE_BYTES), secrets.token_bytes(NONCE_BYTES)
        await asyncio.get_running_loop().sock_sendall(visitor, ours + _mac(self._token, b"door", theirs, ours))
        if not hmac.compare_digest(await _exactly(visitor, MAC_BYTES), _mac(self._token, b"reader", theirs, ours)):
            raise TransferFailed("it does not know the cluster's secret")


async def open_pool(layout: CacheLayout, token: str, incarnation: str) -> OpenPool:
    """Map the pool of a worker's life. Raises TransferFailed: it lives on another host, has no such door, or what is
    there is not what was expected."""
    try:
        async with asyncio.timeout(DOOR_TIMEOUT_S):
            return await _enter(layout, token.encode(), incarnation)
    except TimeoutError:
        raise TransferFailed(f"the door of {incarnation}'s pool was not answered in time") from None
    except OSError as error:
        raise TransferFailed(f"no pool of {incarnation} can be read on this host: {error.strerror or error}") from None


async def _enter(layout: CacheLayout, token: bytes, incarnation: str) -> OpenPool:
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as door:
        await loop.sock_connect(door, _door_name(incarnation))
        _check_user(door)
        ours = secrets.token_bytes(NONCE_BYTES)
        await loop.sock_sendall(door, ours)
        answer = await _exactly(door, NONCE_BYTES + MAC_BYTES)
        theirs, shown = answer[:NONCE_BYTES], answer[NONCE_BYTES:]
        if not hmac.compare_digest(shown, _mac(token, b"door", ours, theirs)):
            raise TransferFailed("whoever opened the door does not know the cluster's secret")
        await loop.sock_sendall(door, _mac(token, b"reader", ours, theirs))
        data, fds = await _receive_fds(door)
    try:
        return _mapped(layout, data, fds)
    finally:
        for fd in fds:
            os.close(fd)


def _mapped(layout: CacheLayout, data: bytes, fds: list[int]) -> OpenPool:
    """The maps keep descriptors of their own."""
    if len(data) != _ANSWER.size or len(fds) < 2:
        raise TransferFailed("the door was shut before the pool came")
    num_blocks, sample_bytes, num_ranks = _ANSWER.unpack(data)
    if num_ranks == 0:
        return _mapped_ring(layout, num_blocks, sample_bytes, fds)
    shares = [Share(rank, num_ranks) for rank in range(num_ranks)]
    wanted = [rank_layout(layout, share).bytes_per_block * num_blocks for share in shares] + [sample_bytes]
    sizes = [os.fstat(fd).st_size for fd in fds]
    if sizes != wanted:
        raise TransferFailed(f"pools and sample have {sizes} bytes, and not those of {num_blocks} blocks, {wanted}")
    with ExitStack() as undo:  # when there are no more descriptors, or no more address space
        kept = []
        for fd in fds[:-1]:
            kept.append(os.dup(fd))
            undo.callback(os.close, kept[-1])
        pool = worker_pool(layout, num_blocks, num_ranks, kept, mmap.ACCESS_READ)
        sample = mmap.mmap(fds[-1], sample_bytes, access=mmap.ACCESS_READ)
        undo.pop_all()
    return OpenPool(pool, sample)


def _mapped_ring(layout: CacheLayout, num_slots: int, sample_bytes: int, fds: list[int]) -> OpenPool:
    """How large a slot is follows from the ring's size; one must have room for a record of each plane."""
    sizes = [os.fstat(fd).st_size for fd in fds]
    slot_bytes, rest = divmod(sizes[0], max(1, num_slots))
    needed = max(plane.bytes_per_block for plane in layout.planes)
    if sizes[1:] != [sample_bytes] or rest or slot_bytes < needed:
        raise TransferFailed(f"ring and sample have {sizes} bytes, and not those of {num_slots} slots, {sample_bytes}")
    ring = StagingRing(slot_bytes, num_slots, os.dup(fds[0]))
    return OpenPool(ring, mmap.mmap(fds[1], sample_bytes, access=mmap.ACCESS_READ))


async def _receive_fds(door: socket.socket) -> tuple[bytes, list[int]]:
    """asyncio cannot receive descriptors: wait until something is there, then take it."""
    loop = asyncio.get_running_loop()
    readable = loop.create_future()
    loop.add_reader(door, lambda: readable.done() or readable.set_result(None))
    try:
        await readable
    finally:
        loop.remove_reader(door)
    data, fds, _, _ = socket.recv_fds(door, _ANSWER.size, MAX_RANKS + 1)
    return data, list(fds)


async def _exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = await asyncio.get_running_loop().sock_recv(sock, size - len(data))
        if not part:
            raise TransferFailed("the other end of a pool's door hung up")
        data += part
    return data


def _check_user(sock: socket.socket) -> None:
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    uid = _CREDENTIALS.unpack(raw)[1]
    if uid != os.getuid():
        raise TransferFailed(f"the other end of a pool's door is user {uid}")


def _mac(token: bytes, who: bytes, reader: bytes, door: bytes) -> bytes:
    return hmac.digest(token, who + reader + door, "sha256")


def _read_only(fd: int) -> int:
    """A descriptor of the same memory that cannot be written to."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


def _door_name(incarnation: str) -> str:
    """In the abstract namespace, which no file system shows and which is free again when the process has ended."""
    return f"\0steelyard-kv-{incarnation}"
