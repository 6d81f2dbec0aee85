"""The porter's links: threads that send, or receive, over a group of two. Loads torch.

A link begins in a thread of its own, says Opened, does its work, and says Ended, when the peer is not found, is none or
has gone. What is no fault of a peer ends the process (porter.py). Nothing but a link's threads keeps its group: when
they have ended, the connection closes.
"""

from __future__ import annotations

import contextlib
import queue
import re
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np
import torch

from kv_transfer.carriers.distributed.group import CONSUMER, PRODUCER, Group, ToldStore, Underway, read_head
from kv_transfer.carriers.distributed.records import (
    NUM_SLOTS,
    Arrived,
    Ended,
    Keys,
    News,
    Open,
    Opened,
    Outgoing,
    PorterSetup,
    Said,
    Send,
    Sent,
)
from kv_transfer.frames import HEADER_BYTES

MAX_UNDERWAY = 2  # bursts that are being sent at one time
HEADS_AHEAD = 2

Emit = Callable[[News], None]
Memory = Callable[[Outgoing], tuple[bytes, torch.Tensor]]  # header and payload


class Link(ABC):
    """What both ends have in common."""

    rank: int

    def __init__(self, order: Open, setup: PorterSetup, emit: Emit) -> None:
        self.name = order.link
        self._order = order
        self._setup = setup
        self._emit = emit
        self._join_timeout_s = setup.timeout_s / 2  # the worker's patience is longer
        self._store = ToldStore(order.keys, self._say, self._join_timeout_s)
        self._thread = threading.Thread(target=self._live, name=f"link {order.link}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def told(self, keys: Keys) -> None:
        self._store.told(keys)

    def _say(self, keys: Keys) -> None:
        self._emit(Said(self.name, keys))

    def _live(self) -> None:
        reason = "the peer's end was closed"
        try:
            self._work(self._joined())
        except (RuntimeError, ConnectionError, TimeoutError) as error:
            reason = _in_short(error)
        self._emit(Ended(self.name, reason))

    def _joined(self) -> Group:
        group = Group(self._store, self.rank, self._setup.host, self._join_timeout_s)
        group.greet(self._order.token)
        if self._setup.device == "cuda":
            from kv_transfer.carriers.distributed.nccl import NcclLane

            group.lane = NcclLane(group, self.rank, self._setup.host, self._setup.timeout_s)
        self._emit(Opened(self.name))
        return group

    @abstractmethod
    def _work(self, group: Group) -> None:
        """Returns or raises when the link is over."""


class SendingLink(Link):
    """The producer's end."""

    rank = PRODUCER

    def __init__(self, order: Open, setup: PorterSetup, emit: Emit, memory: Memory) -> None:
        super().__init__(order, setup, emit)
        self._memory = memory
        self._orders: queue.SimpleQueue[Send | None] = queue.SimpleQueue()

    def send(self, order: Send) -> None:
        self._orders.put(order)

    def _work(self, group: Group) -> None:
        """Until the consumer says farewell, or the connection ends."""
        threading.Thread(target=self._await_end, args=(group,), name=f"end of {self.name}", daemon=True).start()
        underway: deque[Underway] = deque()
        while (order := self._next(underway)) is not None:
            underway.append(group.send(order.pull, [self._memory(one) for one in order.frames]))
            if len(underway) == MAX_UNDERWAY:
                self._finish(underway)

    def _next(self, underway: deque[Underway]) -> Send | None:
        """While there is none, what is underway is finished."""
        while underway:
            try:
                return self._orders.get_nowait()
            except queue.Empty:
                self._finish(underway)
        return self._orders.get()

    def _finish(self, underway: deque[Underway]) -> None:
        underway.popleft().wait()
        self._emit(Sent(self.name))

    def _await_end(self, group: Group) -> None:
        try:
            group.wait_for_farewell()
        except RuntimeError:
            pass  # who sends hears of it too
        finally:
            self._orders.put(None)


class ReceivingLink(Link):
    """The consumer's end. `slots`: its row of the ring, [NUM_SLOTS, slot_bytes]."""

    rank = CONSUMER

    def __init__(self, order: Open, setup: PorterSetup, emit: Emit, slots: torch.Tensor) -> None:
        super().__init__(order, setup, emit)
        self._headers = slots[:, :HEADER_BYTES].numpy()
        self._payloads = [slot[HEADER_BYTES:] for slot in slots]
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._is_closing = threading.Event()
        self.free(range(NUM_SLOTS))

    def free(self, slots: Iterable[int]) -> None:
        for slot in slots:
            self._free.put(slot)

    def close(self) -> None:
        self._store.give_up()
        self._is_closing.set()

    def _work(self, group: Group) -> None:
        """Until the connection ends: after a farewell the producer's end closes it."""
        threading.Thread(target=self._part, args=(group,), name=f"end of {self.name}", daemon=True).start()
        heads = deque(group.expect_head() for _ in range(HEADS_AHEAD))
        expected: deque[tuple[int, Underway]] = deque()
        try:
            while True:
                heads[0].wait()
                pull, frames = read_head(heads.popleft())
                heads.append(group.expect_head())
                slots = tuple([self._take(group, expected, *frame) for frame in frames])
                sizes = tuple([HEADER_BYTES + length for length, _ in frames])
                self._emit(Arrived(self.name, pull, slots, sizes))
        finally:
            self._is_closing.set()

    def _take(self, group: Group, expected: deque[tuple[int, Underway]], length: int, header: bytes) -> int:
        """The next payload, in its slot behind its header."""
        if length > len(self._payloads[0]):
            raise ConnectionError(f"a frame of {length} bytes was announced")
        self._expect(group, expected)
        slot, one = expected.popleft()
        group.take_payload(one, length)
        self._headers[slot] = np.frombuffer(header, np.uint8)
        return slot

    def _expect(self, group: Group, expected: deque[tuple[int, Underway]]) -> None:
        """Every slot that is free is posted; if none is, one has to become so first."""
        while True:
            try:
                slot = self._free.get(block=not expected)
            except queue.Empty:
                return
            expected.append((slot, group.expect_payload(self._payloads[slot])))

    def _part(self, group: Group) -> None:
        self._is_closing.wait()
        with contextlib.suppress(RuntimeError):  # it has ended already
            group.say_farewell().wait()


def _in_short(error: Exception) -> str:
    """Gloo's messages begin with a file of its own, and end with advice."""
    line = str(error).split("\n")[0] or repr(error)
    return re.sub(r"^\[[^ ]*\] ", "", line).split(". ")[0]
