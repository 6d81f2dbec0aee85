"""A group of two over gloo: a producer, rank 0, and a consumer, rank 1. Loads torch.

What gloo does, as of torch 2.13, and this relies on: a receive takes a send that is shorter than it, and one that is
longer ends the process; a receive that was posted before its send costs no round trip; a group that nobody refers to
any more closes its connection, and the other member's receives fail at once; one that waits cannot be called off
otherwise.
"""

from __future__ import annotations

import datetime
import hmac
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch.distributed import ProcessGroupGloo, Store, Work  # pyright: ignore[reportPrivateImportUsage]

from kv_transfer.carriers.distributed.records import MAX_BURST, Keys
from kv_transfer.frames import HEADER_BYTES

PRODUCER, CONSUMER = 0, 1
CONNECT_TRIES = 6  # gloo's, and one to spare: its time-out is that of each
FOREVER = datetime.timedelta(days=3650)  # an idle link may wait for so long
_BURST = struct.Struct("<QQ")  # the number of the pull, and of frames; then of each:
_FRAME = struct.Struct(f"<Q{HEADER_BYTES}s")  # the payload's length, and the frame's header
_HEAD_BYTES = _BURST.size + MAX_BURST * _FRAME.size
_TAG_HELLO, _TAG_HEAD, _TAG_PAYLOAD, _TAG_FAREWELL = range(4)
_NAMES = {PRODUCER: b"producer", CONSUMER: b"consumer"}


class ToldStore(Store):
    """The store at which the two find each other: what one sets goes to `say`, what the other has said is `told`."""

    def __init__(self, keys: Keys, say: Callable[[Keys], None], timeout_s: float) -> None:
        super().__init__()
        self._known = dict(keys)
        self._is_given_up = False
        self._say = say
        self._timeout_s = timeout_s
        self._news = threading.Condition()

    def told(self, keys: Keys) -> None:
        with self._news:
            self._known.update(keys)
            self._news.notify_all()

    def give_up(self) -> None:
        """Nothing more will be told."""
        with self._news:
            self._is_given_up = True
            self._news.notify_all()

    def set(self, key: str, value: bytes) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] (bytes come)
        self.told(((key, value),))
        self._say(((key, value),))

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._known[key]

    def wait(self, keys: list[str], timeout: datetime.timedelta | None = None) -> None:
        with self._news:
            self._news.wait_for(lambda: self.check(keys) or self._is_given_up, self._timeout_s)
            if not self.check(keys):
                raise TimeoutError("the other member did not say where it is")

    def check(self, keys: list[str]) -> bool:
        return self._known.keys() >= set(keys)


class TwoSided(Protocol):
    """What torch's backends do, and its type stubs do not say."""

    def send(self, tensors: list[torch.Tensor], dstRank: int, tag: int) -> Work: ...

    def recv(self, tensors: list[torch.Tensor], srcRank: int, tag: int) -> Work: ...


class PayloadLane(Protocol):
    """Another way for payloads than gloo's own; both sides use it in the order of the heads."""

    def send(self, payload: torch.Tensor) -> None: ...

    def receive(self, into: torch.Tensor) -> None: ...


@dataclass(slots=True, eq=False)
class Underway:
    """What is being sent, or received. It keeps the memory."""

    works: list[Work]
    tensors: list[torch.Tensor]

    def wait(self, timeout: datetime.timedelta = FOREVER) -> None:
        """Raises RuntimeError when the connection ends. Without a timeout the worker has the clock, and kills us."""
        for work in self.works:
            work.wait(timeout)


class Group:
    """Joined by both from when it is made. Raises RuntimeError or TimeoutError if they do not find each other."""

    def __init__(self, store: ToldStore, rank: int, host: str, timeout_s: float) -> None:
        options = ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
        options._devices = [ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = datetime.timedelta(seconds=timeout_s / CONNECT_TRIES)
        options._threads = 1
        self._gloo = cast(TwoSided, ProcessGroupGloo(store, rank, 2, options))
        self._rank = rank
        self._timeout = datetime.timedelta(seconds=timeout_s)
        self.lane: PayloadLane | None = None

    def greet(self, token: bytes) -> None:
        """Before anything is taken or given. Raises ConnectionError if the other one does not know the token."""
        shown = self.exchange(hmac.digest(token, _NAMES[self._rank], "sha256"))
        if not hmac.compare_digest(shown, hmac.digest(token, _NAMES[1 - self._rank], "sha256")):
            raise ConnectionError("whoever is at the other end does not know the link's token")

    def exchange(self, mine: bytes) -> bytes:
        """Both say equally much."""
        theirs = torch.zeros(len(mine), dtype=torch.uint8)
        receiving = self._gloo.recv([theirs], 1 - self._rank, _TAG_HELLO)
        sent = _tensor(mine)
        self._gloo.send([sent], 1 - self._rank, _TAG_HELLO).wait(self._timeout)
        receiving.wait(self._timeout)
        return theirs.numpy().tobytes()

    # --- the producer's ------------------------------------------------------------------------------------

    def send(self, pull: int, frames: list[tuple[bytes, torch.Tensor]]) -> Underway:
        """Headers and payloads of up to MAX_BURST frames."""
        parts = [_FRAME.pack(len(payload), header) for header, payload in frames]
        tensors = [_tensor(b"".join((_BURST.pack(pull, len(frames)), *parts)))]
        works = [self._gloo.send([tensors[0]], CONSUMER, _TAG_HEAD)]
        for _, payload in frames:
            tensors.append(payload)
            if self.lane is not None:
                self.lane.send(payload)
            else:
                works.append(self._gloo.send([payload], CONSUMER, _TAG_PAYLOAD))
        return Underway(works, tensors)

    def wait_for_farewell(self) -> None:
        """Raises RuntimeError if the connection ends without one."""
        farewell = torch.zeros(1, dtype=torch.uint8)
        self._gloo.recv([farewell], CONSUMER, _TAG_FAREWELL).wait(FOREVER)

    # --- the consumer's ------------------------------------------------------------------------------------

    def expect_head(self) -> Underway:
        head = torch.zeros(_HEAD_BYTES, dtype=torch.uint8)
        return Underway([self._gloo.recv([head], PRODUCER, _TAG_HEAD)], [head])

    def expect_payload(self, into: torch.Tensor) -> Underway:
        """The next one, which may be shorter."""
        works = [] if self.lane else [self._gloo.recv([into], PRODUCER, _TAG_PAYLOAD)]
        return Underway(works, [into])

    def take_payload(self, expected: Underway, length: int) -> None:
        """Once its head has come."""
        expected.wait(self._timeout)
        if self.lane is not None:
            self.lane.receive(expected.tensors[0][:length])

    def say_farewell(self) -> Underway:
        nothing = torch.zeros(1, dtype=torch.uint8)
        return Underway([self._gloo.send([nothing], PRODUCER, _TAG_FAREWELL)], [nothing])


def read_head(expected: Underway) -> tuple[int, list[tuple[int, bytes]]]:
    """(number of the pull, [(length of the payload, header)]) of a head that has come. Raises ConnectionError."""
    head = expected.tensors[0].numpy().data
    pull, num_frames = _BURST.unpack_from(head)
    if not 0 < num_frames <= MAX_BURST:
        raise ConnectionError(f"a burst of {num_frames} frames was announced")
    return pull, [_FRAME.unpack_from(head, _BURST.size + index * _FRAME.size) for index in range(num_frames)]


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
