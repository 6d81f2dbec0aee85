"""A fault plan: what goes wrong, and where. Data, so that a run can be repeated, cut down and kept in a file.

A fault strikes at a point: the n-th thing of its kind that happens in one place (a message on a link, a step of an
engine, a turn of a process, a timer of one). Points are counted, not timed, so that one can stand before any await.
A point that is never reached does nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from pydantic import ConfigDict

ARROW = ">"  # of a link: sender>receiver


class PointKind(StrEnum):
    TURN = "turn"  # a task of this process is about to go on (after an await, or for the first time)
    TIMER = "timer"  # this process arms a timer
    STEP = "step"  # the engine of this worker begins a step
    MESSAGE = "message"  # something is sent on this link: a request, an answer, an item of a stream, or its end


class FaultKind(StrEnum):
    CRASH = "crash"  # of `target`, a worker; `for_s` until a new life of it is listed. Unlisted meanwhile, or not
    UNLIST = "unlist"  # the membership goes on without `target` for `for_s`
    CANCEL = "cancel"  # the client of answer `target` leaves, or its gateway wants no more of this answer
    CUT = "cut"  # link `target` carries nothing for `for_s`; what is sent meanwhile comes late. One way or both ways
    SKEW = "skew"  # from now on the clock of the point's process runs at `rate`; `for_s` is put to it at once
    LATE = "late"  # the timer fires `for_s` too late: its process was busy
    SLOW = "slow"  # the step takes `for_s` longer
    DELAY = "delay"  # the message, and with it all later ones of its call or stream, comes `for_s` later
    REORDER = "reorder"  # the message is overtaken by the next one of another call or stream on its link
    LOSE = "lose"  # the message never comes: of a call nothing more does, an open stream breaks
    DUPLICATE = "duplicate"  # the call comes twice, the second time `for_s` later
    FLIP = "flip"  # no fault, but an order: `target` changes its pool
    LEAVE = "leave"  # the same: `target` leaves, with `for_s` to serve what it has; then a new life of it comes
    CORRUPT = "corrupt"  # a bit of the frame is wrong: of its payload, its digest, its number or the HandOff


class How(StrEnum):
    """Variants of a kind."""

    PLAIN = ""
    UNLISTED = "unlisted"
    BOTH_WAYS = "both ways"
    BY_GATEWAY = "by the gateway"
    DIGEST = "digest"
    NUMBER = "number"


@dataclass(frozen=True, slots=True)
class Point:
    """`where`: a process, or a link. `number` counts from 0."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    kind: PointKind
    where: str
    number: int

    def __str__(self) -> str:
        return f"{self.kind} {self.number} of {self.where}"


@dataclass(frozen=True, slots=True)
class Fault:
    """See FaultKind for what `target`, `for_s` and `rate` mean."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    at: Point
    kind: FaultKind
    target: str = ""
    for_s: float = 0.0
    rate: float = 1.0
    how: How = How.PLAIN

    def __str__(self) -> str:
        words = (self.kind, self.target, self.how, f"x{self.rate:g}" if self.rate != 1.0 else "")
        lasts = f" for {self.for_s:g} s" if self.for_s else ""
        return f"{' '.join(word for word in words if word)}{lasts} at {self.at}"


Plan = tuple[Fault, ...]

LASTING = tuple(kind for kind in FaultKind if kind is not FaultKind.SKEW)  # in which `for_s` is a time that passes


def lasting_s(plan: Plan, *kinds: FaultKind) -> float:
    """How long the faults of these kinds last, one after another."""
    return sum(fault.for_s for fault in plan if fault.kind in kinds)


def link(sender: str, receiver: str) -> str:
    return f"{sender}{ARROW}{receiver}"


def ends_of(link_name: str) -> tuple[str, str]:
    sender, _, receiver = link_name.partition(ARROW)
    return sender, receiver
