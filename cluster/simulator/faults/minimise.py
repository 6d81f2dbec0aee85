"""Makes a failing case small: fewer faults, fewer requests, fewer workers and answers, as long as it fails alike.

Delta debugging (Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input", 2002) over the faults, then
over the requests, then one step at a time over what is left, again and again until nothing more can go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from typing import TypeVar

from cluster.simulator.faults.case import Case
from cluster.simulator.faults.run import run_case
from cluster.simulator.faults.scenario import Asked

MOST_EARLIER = 6  # points that one request is likely to account for, where they are messages or steps

Piece = TypeVar("Piece")


def minimise(case: Case, invariant: str, on_try: Callable[[Case], None] = lambda _case: None) -> Case:
    """The smallest case found this way that violates the same invariant. `on_try` is told each case that is tried."""

    def fails(smaller: Case) -> bool:
        on_try(smaller)
        violation = run_case(smaller).violation
        return violation is not None and violation.invariant == invariant

    before = None
    while before != case:
        before, case = case, _smaller(case, fails)
    return case


def _smaller(case: Case, fails: Callable[[Case], bool]) -> Case:
    plan = fewer(case.plan, lambda plan: fails(replace(case, plan=plan)))
    case = replace(case, plan=plan)
    requests = fewer(case.scenario.requests, lambda requests: fails(_with(case, requests)))
    case = _with(case, requests)
    return next(filter(fails, chain(_simpler(case), _without_one_and_earlier(case))), case)


def fewer(pieces: tuple[Piece, ...], fails: Callable[[tuple[Piece, ...]], bool]) -> tuple[Piece, ...]:
    """Of pieces that fail together: some that still do, of which none can go."""
    size = max(1, len(pieces) // 2)
    while pieces:
        parts = (pieces[:start] + pieces[start + size :] for start in range(0, len(pieces), size))
        if (smaller := next(filter(fails, parts), None)) is not None:
            pieces = smaller
            size = min(size, max(1, len(pieces) // 2))
        elif size == 1:
            break
        else:
            size //= 2
    return pieces


def _without_one_and_earlier(case: Case) -> Iterator[Case]:
    """Without one request there are fewer points: what was the ninth message is one of those before it."""
    requests = case.scenario.requests
    for left in (requests[:index] + requests[index + 1 :] for index in range(len(requests))):
        for index, fault in enumerate(case.plan):
            first = max(0, fault.at.number - MOST_EARLIER)
            for number in range(fault.at.number - 1, first - 1, -1):
                moved = replace(fault, at=replace(fault.at, number=number))
                yield _with(replace(case, plan=(*case.plan[:index], moved, *case.plan[index + 1 :])), left)


def _with(case: Case, requests: tuple[Asked, ...]) -> Case:
    return replace(case, scenario=replace(case.scenario, requests=requests))


def _simpler(case: Case) -> Iterator[Case]:
    """One thing less each."""
    scenario = case.scenario
    if scenario.num_prefill > 1:
        yield replace(case, scenario=replace(scenario, num_prefill=1))
    if scenario.num_decode > 1:
        yield replace(case, scenario=replace(scenario, num_decode=1))
    for index, asked in enumerate(scenario.requests):
        less: tuple[dict[str, int | None], ...] = (
            {"num_answers": 1}, {"leaves_after": None}, {"num_shared": 0}, {"moves_after": None},
        )  # fmt: skip
        for plainer in (replace(asked, **one) for one in less):
            if plainer != asked and plainer.num_prompt:
                yield _with(case, (*scenario.requests[:index], plainer, *scenario.requests[index + 1 :]))
