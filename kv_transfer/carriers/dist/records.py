"""What a worker and its mover say to each other. These cross a local pipe, never a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.planes import CacheLayout
from kv_transfer.frames import HEADER_BYTES

NUM_SLOTS = 8  # of a link: frames that are under way or wait to be taken
MAX_LINKS = 64  # of one mover
HEAD_BYTES = 16 + HEADER_BYTES  # the number of the pull, the payload's length, and the frame's header
TOKEN_BYTES = 32

Keys = tuple[tuple[str, bytes], ...]  # where the members of a group are, as they tell each other


@dataclass(frozen=True, slots=True)
class MoverSetup:
    """What a mover is told at its start. `host`: the address on which its groups meet; `frame_bytes`: most of a frame's
    payload; `num_pools`: ranks whose pools it maps, 0 if they cannot be."""

    layout: CacheLayout
    num_blocks: int
    num_pools: int
    host: str
    device: Literal["cpu", "cuda"]
    frame_bytes: int
    timeout_s: float

    @property
    def slot_bytes(self) -> int:
        return HEAD_BYTES + self.frame_bytes

    @property
    def ring_bytes(self) -> int:
        """Virtual: pages are there once a link has used them."""
        return self.slot_bytes * NUM_SLOTS * MAX_LINKS


# --- from the worker ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Open:
    """Begin a link as its producer, or as its consumer with the slots of this row of the ring."""

    link: str
    token: bytes
    row: int | None
    keys: Keys


@dataclass(frozen=True, slots=True)
class Told:
    """What the other member has said."""

    link: str
    keys: Keys


@dataclass(frozen=True, slots=True)
class SendRecords:
    """A frame whose records lie in these blocks of the mapped pool."""

    link: str
    pull: int
    header: bytes
    plane: int
    layers: range
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SendBytes:
    """A frame out of a pool that cannot be mapped."""

    link: str
    pull: int
    header: bytes
    payload: bytes


@dataclass(frozen=True, slots=True)
class SendSample:
    """These bytes of the worker's sample."""

    link: str
    pull: int
    where: range


@dataclass(frozen=True, slots=True)
class Free:
    """What had arrived in this slot was taken."""

    link: str
    slot: int


@dataclass(frozen=True, slots=True)
class Close:
    """Say farewell to the producer."""

    link: str


@dataclass(frozen=True, slots=True)
class Ping:
    """Are you there?"""


Sending = SendRecords | SendBytes | SendSample
Order = Open | Told | Sending | Free | Close | Ping

# --- from the mover -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ready:
    """The mover takes orders."""


@dataclass(frozen=True, slots=True)
class Said:
    """What the other member has to know."""

    link: str
    keys: Keys


@dataclass(frozen=True, slots=True)
class Opened:
    """Both members have shown that they know the token."""

    link: str


@dataclass(frozen=True, slots=True)
class Sent:
    """The oldest of what was to be sent over this link has been."""

    link: str


@dataclass(frozen=True, slots=True)
class Arrived:
    """A frame of this pull is in this slot of the link's row: header and payload, `size_bytes` together."""

    link: str
    pull: int
    slot: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The link is over."""

    link: str
    reason: str


@dataclass(frozen=True, slots=True)
class Pong:
    """I am."""


News = Ready | Said | Opened | Sent | Arrived | Ended | Pong
