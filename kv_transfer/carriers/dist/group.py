"""A group of two over gloo: a producer, rank 0, and a consumer, rank 1. Loads torch.

What gloo does, as of torch 2.13, and this relies on: a receive takes a send that is shorter than it, and one that is longer
ends the process; a receive that was posted before its send costs no round trip; a group that nobody refers to any more
closes its connection, and the other member's receives fail at once; one that waits cannot be called off otherwise.
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

from kv_transfer.carriers.dist.records import HEAD_BYTES, Keys
from kv_transfer.frames import HEADER_BYTES

PRODUCER, CONSUMER = 0, 1
FOREVER = datetime.timedelta(days=3650)  # an idle link may wait for so long
HEAD = struct.Struct(f"<QQ{HEADER_BYTES}s")
_TAG_HELLO, _TAG_HEAD, _TAG_PAYLOAD, _TAG_FAREWELL = range(4)
_NAMES = {PRODUCER: b"producer", CONSUMER: b"consumer"}
assert HEAD.size == HEAD_BYTES


class ToldStore(Store):
    """The store at which the two find each other: what one sets is handed to `say`, what the other has said is `told`."""

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
    """A frame that is being sent. It keeps what is sent."""

    works: list[Work]
    tensors: tuple[torch.Tensor, ...]

    def wait(self) -> None:
        for work in self.works:
            work.wait(FOREVER)  # the worker has the clock, and kills us


class Group:
    """Joined by both from when it is made. Raises RuntimeError or TimeoutError if they do not find each other."""

    def __init__(self, store: ToldStore, rank: int, host: str, timeout_s: float) -> None:
        options = ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
        options._devices = [ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = self._timeout = datetime.timedelta(seconds=timeout_s)
        options._threads = 1
        self._gloo = cast(TwoSided, ProcessGroupGloo(store, rank, 2, options))
        self._rank = rank
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

    def send(self, pull: int, header: bytes, payload: torch.Tensor) -> Underway:
        head = _tensor(HEAD.pack(pull, len(payload), header))
        works = [self._gloo.send([head], CONSUMER, _TAG_HEAD)]
        if self.lane is not None:
            self.lane.send(payload)
        else:
            works.append(self._gloo.send([payload], CONSUMER, _TAG_PAYLOAD))
        return Underway(works, (head, payload))

    def wait_for_farewell(self) -> None:
        """Raises RuntimeError if the connection ends without one."""
        self._gloo.recv([torch.zeros(1, dtype=torch.uint8)], CONSUMER, _TAG_FAREWELL).wait(FOREVER)

    # --- the consumer's ------------------------------------------------------------------------------------

    def expect(self, slot: torch.Tensor) -> Expected:
        """Take the next frame into this slot."""
        head = self._gloo.recv([slot[:HEAD_BYTES]], PRODUCER, _TAG_HEAD)
        payload = None if self.lane else self._gloo.recv([slot[HEAD_BYTES:]], PRODUCER, _TAG_PAYLOAD)
        return Expected(slot, head, payload, self.lane, self._timeout)

    def say_farewell(self) -> Underway:
        nothing = torch.zeros(1, dtype=torch.uint8)
        return Underway([self._gloo.send([nothing], PRODUCER, _TAG_FAREWELL)], (nothing,))


@dataclass(slots=True, eq=False)
class Expected:
    """A frame that will come."""

    slot: torch.Tensor
    head: Work
    payload: Work | None
    lane: PayloadLane | None
    timeout: datetime.timedelta

    def wait(self) -> tuple[int, int]:
        """(number of the pull, bytes of the payload). Raises RuntimeError when the connection ends, ValueError if it is
        no frame."""
        self.head.wait(FOREVER)
        pull, length, _ = HEAD.unpack(self.slot[:HEAD_BYTES].numpy().data)
        if length > len(self.slot) - HEAD_BYTES:
            raise ValueError(f"a frame of {length} bytes does not fit its slot")
        if self.payload is not None:
            self.payload.wait(self.timeout)
        elif self.lane is not None:
            self.lane.receive(self.slot[HEAD_BYTES : HEAD_BYTES + length])
        return pull, length


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
