"""Draws fault plans: over all points that a run without faults came to, from one seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from cluster.simulator.chance import Chance
from cluster.simulator.faults.network import CALLS, FRAME
from cluster.simulator.faults.plan import Fault, FaultKind, How, Plan, Point, PointKind, link
from cluster.simulator.faults.points import Census, Place
from cluster.simulator.faults.scenario import Scenario
from cluster.simulator.world import GATEWAY

MOST_FAULTS = 5
MEANS_S = (0.02, 0.3, 3.0)  # of how long something lasts: less than a request, as long, longer
LONGEST_S = 12.0
MOST_SKEW = 0.1  # of a clock's rate: far more than real ones
FARTHEST_AHEAD_S = 1000.0

KINDS = tuple(FaultKind)
HOWS = {
    FaultKind.CRASH: (How.PLAIN, How.UNLISTED),
    FaultKind.CUT: (How.PLAIN, How.BOTH_WAYS),
    FaultKind.CANCEL: (How.PLAIN, How.BY_GATEWAY),
    FaultKind.CORRUPT: (How.PLAIN, How.PLAIN, How.DIGEST, How.NUMBER),
}


def draw_plan(seed: int, scenario: Scenario, census: Census) -> Plan:
    chance = Chance(seed, "plan")
    count = chance.between(1, chance.between(1, MOST_FAULTS))
    drawn = (_draw_fault(chance, KINDS[chance.below(len(KINDS))], scenario, census) for _ in range(count))
    return tuple(fault for fault in drawn if fault is not None)


def _draw_fault(chance: Chance, kind: FaultKind, scenario: Scenario, census: Census) -> Fault | None:
    """None where the run had no point for it (a frame to be corrupted, say)."""
    points = list(_points_for(kind, census))
    num_points = sum(len(numbers) for _, numbers in points)
    if not num_points:
        return None
    at, hows = _nth(points, chance.below(num_points)), HOWS.get(kind, (How.PLAIN,))
    if kind is FaultKind.SKEW and chance.below(2):
        at = replace(at, number=0)  # only where a clock begins may it be anywhere
    how = hows[chance.below(len(hows))]
    return Fault(at, kind, _target(chance, kind, scenario), _duration_s(chance, kind, at), _rate(chance, kind), how)


def _points_for(kind: FaultKind, census: Census) -> Iterator[tuple[Place, Sequence[int]]]:
    """Places, and the numbers of the points there at which such a fault can strike."""
    if kind in (FaultKind.DUPLICATE, FaultKind.CORRUPT):
        wanted = CALLS if kind is FaultKind.DUPLICATE else (FRAME,)
        for link_name, whats in census.messages:
            yield (PointKind.MESSAGE, link_name), [number for number, what in enumerate(whats) if what in wanted]
        return
    for (point_kind, where), count in census.counts:
        is_workers_timer = point_kind is PointKind.TIMER and where != GATEWAY  # a late gateway breaks its deadlines
        match kind:
            case FaultKind.LATE:
                fits = is_workers_timer
            case FaultKind.SLOW:
                fits = point_kind is PointKind.STEP
            case FaultKind.DELAY | FaultKind.REORDER | FaultKind.LOSE:
                fits = point_kind is PointKind.MESSAGE
            case FaultKind.SKEW:
                fits = point_kind is PointKind.TURN
            case _:
                fits = True
        if fits:
            yield (point_kind, where), range(count)


def _nth(points: Sequence[tuple[Place, Sequence[int]]], index: int) -> Point:
    for (kind, where), numbers in points:
        if index < len(numbers):
            return Point(kind, where, numbers[index])
        index -= len(numbers)
    raise AssertionError("the index is below the number of points")


def _target(chance: Chance, kind: FaultKind, scenario: Scenario) -> str:
    workers = scenario.worker_ids
    match kind:
        case FaultKind.CRASH | FaultKind.UNLIST | FaultKind.FLIP | FaultKind.LEAVE:
            return workers[chance.below(len(workers))]
        case FaultKind.CANCEL:
            asked = scenario.requests[chance.below(len(scenario.requests))]
            return asked.answer_names[chance.below(asked.num_answers)]
        case FaultKind.CUT:
            ends = (GATEWAY, *workers)
            first = chance.below(len(ends))
            second = (first + chance.between(1, len(ends) - 1)) % len(ends)
            return link(ends[first], ends[second])
    return ""


def _duration_s(chance: Chance, kind: FaultKind, at: Point) -> float:
    if kind in (FaultKind.CANCEL, FaultKind.REORDER, FaultKind.LOSE, FaultKind.CORRUPT, FaultKind.FLIP):
        return 0.0
    if kind is FaultKind.SKEW:
        return 0.0 if at.number else round(chance.unit() * FARTHEST_AHEAD_S, 3)
    return round(min(LONGEST_S, chance.exponential(MEANS_S[chance.below(len(MEANS_S))])), 4)


def _rate(chance: Chance, kind: FaultKind) -> float:
    return round(1 + MOST_SKEW * (2 * chance.unit() - 1), 4) if kind is FaultKind.SKEW else 1.0
