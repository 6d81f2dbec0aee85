"""Seen: what the controller knows at one moment, and whether it can be believed. Pure records.

A window (window.py) makes it of what the gateways report.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain

from cluster.control.demand import Demand, burstiness_of, demand_of
from cluster.control.rules import ControllerConfig
from cluster.control.sizing import Machine
from engine.types import Role
from router.arrivals import Arrived, Fared
from router.report import StepTable, WorkerStand

LATE, ROOM = ("ttft",), ("tpot", "blocks", "seats")  # what refusals say is lacking: prefill, or decode
NEED_S = 3.0  # of refusals that are looked at
NEED_SHARE, NEED_FEWEST = 0.1, 2  # so many refused, and at least so many
QUEUE_PART = 0.8  # of a first token's target, that even the shortest queue takes
MOST_SAMPLED, MOST_PARTS = 1024, 64  # arrivals, and parts of a window
MOST = 1e9  # of anything that is counted or timed
SHORTEST_S = 1.0
FREE_PART = 0.1  # of the blocks, that even the emptiest decode worker has


class Need(StrEnum):
    """Which pool is short now, by what has happened in the last seconds."""

    NONE = "none"
    PREFILL = "prefill"
    DECODE = "decode"

    @staticmethod
    def of(role: Role) -> Need:
        return Need.PREFILL if role is Role.PREFILL else Need.DECODE


@dataclass(frozen=True, slots=True)
class Seen:
    """`arrived` and `fared` in the order of their times, on the controller's clock, and those of the window at least.
    `tables`: of decode steps, by cohort; `transfer_token_s`: that KV of one token takes on a link. `is_incomplete`:
    workers that should be there are not; `coming`: all that are not there, and of
    these `new` those that were added and have never been; `num_leaving`: workers that leave for good, which are none of
    `workers`; `num_unreported`: workers that are listed, and of which no gateway has told yet."""

    now: float
    reported_at: float  # when a gateway was last heard
    arrived: tuple[Arrived, ...]
    fared: tuple[Fared, ...]
    workers: tuple[WorkerStand, ...]
    tables: tuple[tuple[str, StepTable], ...]
    transfer_token_s: float
    block_size: int
    max_batch_seqs: int
    is_flipping: bool = False
    is_incomplete: bool = False
    coming: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    num_leaving: int = 0
    num_unreported: int = 0

    @property
    def num_workers(self) -> int:
        return len(self.workers)

    @property
    def cohorts(self) -> list[str]:
        """Those with at least two workers: one has no split."""
        count = dict.fromkeys((worker.cohort for worker in self.workers), 0)
        for worker in self.workers:
            count[worker.cohort] += 1
        return [cohort for cohort, number in count.items() if number > 1]

    def workers_of(self, cohort: str) -> list[WorkerStand]:
        return [worker for worker in self.workers if worker.cohort == cohort]

    def cohort_of(self, worker_id: str) -> str:
        return next((worker.cohort for worker in self.workers if worker.worker_id == worker_id), "")

    def machine(self, cohort: str) -> Machine | None:
        table = next((table for name, table in self.tables if name == cohort), None)
        workers = self.workers_of(cohort)
        if table is None or not workers:
            return None
        num_blocks = min((worker.num_blocks for worker in workers if worker.num_blocks), default=0)
        if not num_blocks:
            return None  # nobody has reported yet
        return Machine(table, num_blocks * self.block_size, self.max_batch_seqs, self.transfer_token_s)

    def num_arrived(self, span_s: float) -> int:
        """Of late, for so long."""
        return len(self.arrived) - self._place(self.now - span_s)

    def num_between(self, begin: float, end: float) -> int:
        return self._place(end) - self._place(begin)

    def sample(self, span_s: float) -> tuple[Arrived, ...]:
        """Of those, every so manieth: a decision must not take the longer the more there are."""
        return self.sample_between(self.now - span_s, math.inf)

    def sample_between(self, begin: float, end: float) -> tuple[Arrived, ...]:
        first, after = self._place(begin), self._place(end)
        return self.arrived[first : after : max(1, -(-(after - first) // MOST_SAMPLED))]

    def demand(self, span_s: float) -> Demand | None:
        """What came of late, since the first of it: a window fills itself anew after a start. None: nothing did."""
        count = self.num_arrived(span_s)
        if not count:
            return None
        begin = self.arrived[len(self.arrived) - count].at
        span_s = max(SHORTEST_S, self.now - begin)
        num_parts = min(MOST_PARTS, int(math.sqrt(count)))
        places = [self._place(begin + span_s * part / max(1, num_parts)) for part in range(num_parts)]
        counts = [after - before for before, after in zip(places, [*places[1:], len(self.arrived)], strict=False)]
        return demand_of(self.sample(span_s), count / span_s, burstiness_of(counts))

    def _place(self, at: float) -> int:
        return bisect_left(self.arrived, at, key=lambda one: one.at)

    def fared_since(self, span_s: float) -> tuple[Fared, ...]:
        return self.fared[bisect_left(self.fared, self.now - span_s, key=lambda one: one.at) :]


def absurd(seen: Seen, rules: ControllerConfig) -> str:
    """Why nothing may be concluded from it; empty: it may."""
    if not abs(seen.now) <= MOST:
        return "the time is not a number"
    if not seen.now - seen.reported_at <= rules.stale_s:
        return f"the gateways were not heard for {rules.stale_s:g} s"
    if not seen.workers:
        return "no worker is there"
    ids = [worker.worker_id for worker in seen.workers]
    if len(dict.fromkeys(ids)) != len(ids):
        return "one worker is there twice"
    if not all(_is_sane(worker) for worker in seen.workers):
        return "a worker's numbers are absurd"
    if not all(map(_is_sane_arrival, seen.sample(rules.window_s))):
        return "the numbers of an arrival are absurd"
    times = chain.from_iterable(chain(table.added_s, *table.step_s) for _, table in seen.tables)
    if not all(0 <= one <= MOST for one in (*times, seen.transfer_token_s)):
        return "a predicted time is absurd"
    return ""


def need_of(seen: Seen, workers: Sequence[WorkerStand], rules: ControllerConfig) -> Need:
    """Both short is none: there is nothing to give."""
    late, room = _refused(seen, LATE), _refused(seen, ROOM)
    targets = sorted(one.ttft_s for one in seen.sample(rules.recent_s) if math.isfinite(one.ttft_s))
    queues = [one.queued_s for one in workers if one.role is Role.PREFILL]
    free = [one.num_free_blocks / one.num_blocks for one in workers if one.role is Role.DECODE and one.num_blocks]
    late = late or bool(targets and queues and min(queues) > QUEUE_PART * targets[len(targets) // 2])
    room = room or bool(free and max(free) < FREE_PART)
    if late == room:
        return Need.NONE
    return Need.PREFILL if late else Need.DECODE


def burden(worker: WorkerStand) -> tuple[float, float]:
    """What its leaving would have to move or wait for."""
    if worker.role is Role.PREFILL:
        return worker.queued_s, worker.num_tokens
    return worker.num_tokens, worker.queued_s


def pool_of(workers: Sequence[WorkerStand], role: Role) -> list[WorkerStand]:
    return [worker for worker in workers if worker.role is role]


def _refused(seen: Seen, reasons: Sequence[str]) -> bool:
    count = sum(one.refused in reasons for one in seen.fared_since(NEED_S))
    return count >= max(NEED_FEWEST, NEED_SHARE * seen.num_arrived(NEED_S))


def _is_sane(worker: WorkerStand) -> bool:
    numbers = (
        worker.queued_s, worker.num_decodes, worker.num_tokens, worker.num_blocks, worker.num_free_blocks,
        worker.num_cached_blocks,
    )  # fmt: skip
    return all(0 <= one <= MOST for one in numbers) and worker.num_free_blocks <= worker.num_blocks


def _is_sane_arrival(one: Arrived) -> bool:
    numbers = one.at, one.num_prompt, one.num_cached, one.num_output, one.compute_s
    return (
        all(0 <= number <= MOST for number in numbers[1:])
        and math.isfinite(one.at)
        and one.ttft_s >= 0
        and one.tpot_s >= 0
    )
