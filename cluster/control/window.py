"""The window: what the gateways have reported of late, as one.

Arrivals of all gateways are merged by their times, on the controller's clock; what is older than the window is dropped.
Of each worker the sequences of all gateways add up; blocks are its own word. Who it is, and in which pool, says the
membership.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from cluster.control.seen import Seen
from router.arrivals import Arrived, Fared
from router.membership import Member
from router.report import GatewayReport, WorkerStand

Noted = TypeVar("Noted", Arrived, Fared)


@dataclass(frozen=True, slots=True)
class Look:
    """All that a tick learns. `is_whole`: every worker is there that should be, or has been added and is to come."""

    now: float
    reports: tuple[GatewayReport, ...]
    members: tuple[Member, ...]
    is_flipping: bool
    is_whole: bool
    coming: tuple[str, ...] = ()  # workers that are not there yet, or not there again
    new: tuple[str, ...] = ()  # of these, those that have never been there
    num_leaving: int = 0  # workers that leave for good, and are no members any more


@dataclass(frozen=True, slots=True)
class Kept:
    """What is left of earlier looks; `reports` with the times at which they came."""

    arrived: tuple[Arrived, ...] = ()
    fared: tuple[Fared, ...] = ()
    reports: tuple[tuple[float, GatewayReport], ...] = ()


class Window:
    """`span_s`: of arrivals; `stale_s`: after which a gateway that was not heard again does not count."""

    def __init__(self, span_s: float, stale_s: float, kept: Kept = Kept()) -> None:
        self._span_s = span_s
        self._stale_s = stale_s
        self.kept = kept

    def after(self, look: Look) -> Seen:
        """Take a look in; what is known then."""
        kept, oldest = self.kept, look.now - self._span_s
        reports = {report.gateway_id: (at, report) for at, report in kept.reports}
        arrived, fared = list[Arrived](), list[Fared]()
        for report in look.reports:
            shift = look.now - report.now
            reports[report.gateway_id] = look.now, replace(report, arrived=(), fared=())
            arrived += [replace(one, at=one.at + shift) if shift else one for one in report.arrived]
            fared += [replace(one, at=one.at + shift) if shift else one for one in report.fared]
        self.kept = Kept(
            _merged(kept.arrived, arrived, oldest),
            _merged(kept.fared, fared, oldest),
            tuple(
                sorted((one for one in reports.values() if one[0] >= look.now - self._stale_s), key=lambda one: one[0])
            ),
        )
        return _seen(self.kept, look)


def _merged(before: tuple[Noted, ...], new: list[Noted], oldest: float) -> tuple[Noted, ...]:
    """In the order of their times, which is about that in which they came."""
    both = [*before[bisect_left(before, oldest, key=_at) :], *new]
    both.sort(key=_at)  # of what is in order but for its end it takes one pass
    return tuple(both)


def _at(one: Arrived | Fared) -> float:
    return one.at


def _seen(kept: Kept, look: Look) -> Seen:
    newest = [report for _, report in kept.reports]
    last = newest[-1] if newest else None
    stands = [stand for member in look.members if (stand := _stand(member, newest)) is not None]
    return Seen(
        look.now, max((at for at, _ in kept.reports), default=-math.inf), kept.arrived, kept.fared, tuple(stands),
        last.steps if last is not None else (), last.transfer_token_s if last is not None else 0.0,
        last.block_size if last is not None else 1, last.max_batch_seqs if last is not None else 1, look.is_flipping,
        not look.is_whole or len(stands) < len(look.members), look.coming, look.new,
        look.num_leaving, len(look.members) - len(stands),
    )  # fmt: skip


def _stand(member: Member, reports: Sequence[GatewayReport]) -> WorkerStand | None:
    """None: no gateway has heard of this life of it."""
    workers = [worker for report in reports for worker in report.workers]
    mine = [worker for worker in workers if (worker.worker_id, worker.incarnation) == member.name]
    if not mine:
        return None
    return replace(
        mine[-1],
        role=member.role,
        role_epoch=member.role_epoch,
        queued_s=max(one.queued_s for one in mine),
        num_decodes=max(one.num_decodes for one in mine),
        num_tokens=sum(one.num_tokens for one in mine),
    )
