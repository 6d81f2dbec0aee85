"""Occupancy: what our requests will take of a worker, as predicted, laid out for quick questions.

`Prompts` are those without a first token, in the order of their turns: by when they are due, equal ones as they came.
`Decodes` are those that decode there or will, by when they end. Both are derived from the table of live requests
(router/book.py).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import add, itemgetter
from typing import NamedTuple

from router.policies.rehearsal import Prompt, rehearse


@dataclass(frozen=True, slots=True)
class Prompts:
    """In the order of their turns. `done_at`: when the work before each is done, and in the end all of it, by sums of
    what began at `since`. `slacks_s`: of each and those after it, the least time between its first token and when it is
    due, and in the end infinite."""

    all: tuple[Prompt, ...] = ()
    since: float = 0.0
    ends: tuple[float, ...] = ()  # rehearsed: when each gives its first token
    dues: tuple[float, ...] = ()
    done_at: tuple[float, ...] = (-math.inf,)
    slacks_s: tuple[float, ...] = (math.inf,)

    def around_s(self, due: float, now: float) -> tuple[float, float]:
        """Of a new prompt that is due then: seconds of work before it, and seconds that those after it can be held up
        without being late."""
        place = bisect_right(self.dues, due)
        before_s = self.done_at[place] - now
        return before_s if before_s > 0.0 else 0.0, self.slacks_s[place]

    def left_s(self, now: float) -> float:
        return max(0.0, self.done_at[-1] - now)


class Decode(NamedTuple):
    """`ends`: when its last token is expected; `num_tokens`: stored in the middle of what is left of its life."""

    ends: float
    num_tokens: float
    tpot_s: float  # its target


@dataclass(frozen=True, slots=True)
class Decodes:
    """By their ends; `tokens` and `tpots_s` are the sum and the least of each and those after it, then of none."""

    ends: tuple[float, ...] = ()
    tokens: tuple[float, ...] = (0.0,)
    tpots_s: tuple[float, ...] = (math.inf,)

    def at(self, time: float) -> tuple[int, float, float]:
        """Of those that still run then: how many, their tokens, and the tightest target."""
        place = bisect_right(self.ends, time)
        return len(self.ends) - place, self.tokens[place], self.tpots_s[place]


NO_PROMPTS = Prompts()
NO_DECODES = Decodes()


def prompts_of(prompts: Iterable[Prompt], since: float, chunk: int, budget: int) -> Prompts:
    """`chunk` and `budget`: as for `rehearse`."""
    ordered = tuple(sorted(prompts, key=turn_of))
    if not ordered:
        return NO_PROMPTS
    sums_s = accumulate([one.compute_s * one.num_left / one.num_tokens for one in ordered])
    done_at = (-math.inf, *[since + sum_s for sum_s in sums_s])
    ends = tuple(rehearse(ordered, since, chunk, budget))
    slacks_s = [one.due - end for one, end in zip(ordered, ends, strict=True)]
    dues = tuple([one.due for one in ordered])
    return Prompts(ordered, since, ends, dues, done_at, (*_from_the_end(slacks_s, min), math.inf))


def with_one_more(prompts: Prompts, new: Prompt, chunk: int, budget: int) -> tuple[float, list[tuple[float, float]]]:
    """When a new prompt gives its first token; and of each of the others when it does, and when it is due."""
    ordered = sorted((*prompts.all, new), key=turn_of)
    ends = rehearse(ordered, prompts.since if prompts.all else new.placed, chunk, budget)
    others = [(end, one.due) for one, end in zip(ordered, ends, strict=True) if one is not new]
    return ends[ordered.index(new)], others


def turn_of(prompt: Prompt) -> tuple[float, float]:
    return prompt.due, prompt.placed


def decodes_of(decodes: Iterable[Decode | tuple[float, float, float]]) -> Decodes:
    ordered = sorted(decodes, key=itemgetter(0))
    if not ordered:
        return NO_DECODES
    ends, tokens, tpots_s = zip(*ordered, strict=True)
    return Decodes(ends, (*_from_the_end(tokens, add), 0.0), (*_from_the_end(tpots_s, min), math.inf))


def _from_the_end(values: Sequence[float], combine: Callable[[float, float], float]) -> tuple[float, ...]:
    return tuple(accumulate(reversed(values), combine))[::-1]
