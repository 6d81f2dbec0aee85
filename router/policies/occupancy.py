"""Occupancy: what our requests will take of a worker, as predicted, laid out for quick questions.

`Prompts` are those without a first token, in the order of their turns: by when they are due, equal ones as they came.
`Decodes` are those that decode there or will, by when they end. Both are derived from the table of live requests
(router/book.py).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate

from router.policies.rehearsal import Prompt, rehearse


@dataclass(frozen=True, slots=True)
class Prompts:
    """In the order of their turns. `sums_s`: the work of each and those before it, of which the first began at `since`.
    `slacks_s`: of each and those after it, the least time between its first token and when it is due."""

    all: tuple[Prompt, ...] = ()
    since: float = 0.0
    ends: tuple[float, ...] = ()  # rehearsed: when each gives its first token
    dues: tuple[float, ...] = ()
    sums_s: tuple[float, ...] = ()
    slacks_s: tuple[float, ...] = ()

    def before_s(self, due: float, now: float) -> float:
        """Seconds of work before a new prompt that is due then."""
        place = bisect_right(self.dues, due)
        return max(0.0, self.since + self.sums_s[place - 1] - now) if place else 0.0

    def room_s(self, due: float) -> float:
        """Seconds that those after a new one can be held up without being late."""
        place = bisect_right(self.dues, due)
        return self.slacks_s[place] if place < len(self.slacks_s) else math.inf

    def left_s(self, now: float) -> float:
        return max(0.0, self.since + self.sums_s[-1] - now) if self.sums_s else 0.0


@dataclass(frozen=True, slots=True)
class Decode:
    """`ends`: when its last token is expected; `num_tokens`: stored in the middle of what is left of its life."""

    ends: float
    num_tokens: float
    tpot_s: float  # its target


@dataclass(frozen=True, slots=True)
class Decodes:
    """By their ends; `tokens` and `tpots_s` are the sum and the least of each and those after it."""

    ends: tuple[float, ...] = ()
    tokens: tuple[float, ...] = ()
    tpots_s: tuple[float, ...] = ()

    def at(self, time: float) -> tuple[int, float, float]:
        """Of those that still run then: how many, their tokens, and the tightest target."""
        place = bisect_right(self.ends, time)
        if place == len(self.ends):
            return 0, 0.0, math.inf
        return len(self.ends) - place, self.tokens[place], self.tpots_s[place]


NO_PROMPTS = Prompts()
NO_DECODES = Decodes()


def prompts_of(prompts: Iterable[Prompt], since: float, chunk: int, budget: int) -> Prompts:
    """`chunk` and `budget`: as for `rehearse`."""
    ordered = tuple(sorted(prompts, key=turn_of))
    sums_s = tuple(accumulate(one.compute_s * one.num_left / one.num_tokens for one in ordered))
    ends = tuple(rehearse(ordered, since, chunk, budget))
    slacks_s = [one.due - end for one, end in zip(ordered, ends, strict=True)]
    return Prompts(ordered, since, ends, tuple(one.due for one in ordered), sums_s, _from_the_end(slacks_s, min))


def with_one_more(prompts: Prompts, new: Prompt, chunk: int, budget: int) -> tuple[float, list[tuple[float, float]]]:
    """When a new prompt gives its first token; and of each of the others when it does, and when it is due."""
    ordered = sorted((*prompts.all, new), key=turn_of)
    ends = rehearse(ordered, prompts.since if prompts.all else new.placed, chunk, budget)
    others = [(end, one.due) for one, end in zip(ordered, ends, strict=True) if one is not new]
    return ends[ordered.index(new)], others


def turn_of(prompt: Prompt) -> tuple[float, float]:
    return prompt.due, prompt.placed


def decodes_of(decodes: Iterable[Decode]) -> Decodes:
    ordered = sorted(decodes, key=lambda one: one.ends)
    tokens = _from_the_end([one.num_tokens for one in ordered], lambda total, one: total + one)
    return Decodes(
        tuple(one.ends for one in ordered), tokens, _from_the_end([one.tpot_s for one in ordered], min)
    )  # fmt: skip


def _from_the_end(values: list[float], combine: Callable[[float, float], float]) -> tuple[float, ...]:
    return tuple(accumulate(reversed(values), combine))[::-1]
