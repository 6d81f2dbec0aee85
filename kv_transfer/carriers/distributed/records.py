"""What a worker and its porter say to each other. These cross a local pipe, never a network.

They have no slots: there are a few for each frame, and pickle is several times faster without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.planes import CacheLayout
from kv_transfer.frames import HEADER_BYTES

NUM_SLOTS = 12  # of a link: frames that are under way or wait to be taken
MAX_LINKS = 64  # of one porter
MAX_BURST = 4  # frames that are ordered, announced and told of together, for each of that costs as much as to send one
TOKEN_BYTES = 32

Keys = tuple[tuple[str, bytes], ...]  # where the members of a group are, as they tell each other


@dataclass(frozen=True, slots=True)
class PorterSetup:
    """What a porter is told at its start. `host`: the address on which its groups meet; `frame_bytes`: most of a
    frame's payload; `num_pools`: ranks whose pools it maps, 0 if they cannot be."""

    layout: CacheLayout
    num_blocks: int
    num_pools: int
    host: str
    device: Literal["cpu", "cuda"]
    frame_bytes: int
    timeout_s: float

    @property
    def slot_bytes(self) -> int:
        """A frame's header and payload."""
        return HEADER_BYTES + self.frame_bytes

    @property
    def ring_bytes(self) -> int:
        """Virtual: pages are there once a link has used them."""
        return self.slot_bytes * NUM_SLOTS * MAX_LINKS


# --- from the worker ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Open:
    """Begin a link as its producer, or as its consumer with the slots of this row of the ring."""

    link: str
    token: bytes
    row: int | None
    keys: Keys


@dataclass(frozen=True)
class Told:
    """What the other member has said."""

    link: str
    keys: Keys


@dataclass(frozen=True)
class Records:
    """A frame whose records lie in these blocks of the mapped pool."""

    header: bytes
    plane: int
    layers: range
    block_ids: tuple[int, ...]


@dataclass(frozen=True)
class Payload:
    """A frame out of a pool that cannot be mapped."""

    header: bytes
    payload: bytes


@dataclass(frozen=True)
class SamplePart:
    """These bytes of the worker's sample."""

    where: range


Outgoing = Records | Payload | SamplePart


@dataclass(frozen=True)
class Send:
    """Up to MAX_BURST frames of one pull."""

    link: str
    pull: int
    frames: tuple[Outgoing, ...]


@dataclass(frozen=True)
class Free:
    """What had arrived in these slots was taken."""

    link: str
    slots: tuple[int, ...]


@dataclass(frozen=True)
class Close:
    """Say farewell to the producer."""

    link: str


@dataclass(frozen=True)
class Ping:
    """Are you there?"""


Order = Open | Told | Send | Free | Close | Ping

# --- from the porter -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ready:
    """The porter takes orders."""


@dataclass(frozen=True)
class Said:
    """What the other member has to know."""

    link: str
    keys: Keys


@dataclass(frozen=True)
class Opened:
    """Both members have shown that they know the token."""

    link: str


@dataclass(frozen=True)
class Sent:
    """The oldest burst that was to be sent over this link has been."""

    link: str


@dataclass(frozen=True)
class Arrived:
    """Frames of this pull are in these slots of the link's row. `sizes`: of header and payload together."""

    link: str
    pull: int
    slots: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Ended:
    """The link is over."""

    link: str
    reason: str


@dataclass(frozen=True)
class Pong:
    """I am."""


News = Ready | Said | Opened | Sent | Arrived | Ended | Pong
