"""A rehearsal: the steps by which an engine will compute the prompts that it has, in the order of engine/scheduler.py.

The step under way holds what was there when it began. All whose last position is in a step get their first tokens at
its end, so who joins a step makes everybody in it wait. The first prompt that has begun always has its chunk, then come
begun ones with no more than a chunk left, those that fit whole, and the rest as far as there is room.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Prompt:
    """`due`: when its first token is; infinite: nothing was promised. `compute_s`: of all its `num_tokens`, predicted
    when it was placed; `num_left` of them are still to be computed."""

    due: float
    placed: float
    num_tokens: int
    compute_s: float
    num_left: int

    @property
    def left_s(self) -> float:
        return self.compute_s * self.num_left / self.num_tokens


class Run(NamedTuple):
    """`num` equal steps, one after the other. `taken`: (number, tokens) of the prompts in each."""

    begins: float
    step_s: float
    num: int
    ends: float
    taken: list[tuple[int, int]]


def rehearse(prompts: Sequence[Prompt], since: float, chunk: int, budget: int) -> list[float]:
    """When each gives its first token, if a step begins at `since`. `prompts` are in the order of their turns, with at
    least one token each; a step takes at most `chunk` tokens of one and `budget` of all."""
    ends = [0.0] * len(prompts)
    for run in _runs(prompts, since, chunk, budget):
        for number, _ in run.taken:
            ends[number] = run.ends  # the last one that it is in
    return ends


def progressed(prompts: Sequence[Prompt], work_s: float, chunk: int) -> list[Prompt]:
    """The same prompts, in the order of their turns, when a step has ended that gave a first token to none of them, and
    that has computed for `work_s` beside those that have theirs. Most went to a prompt longer than a chunk, for others
    are done in one step. All have at least a token left, for none has given its first one."""
    left = [one.num_left for one in prompts]
    order = sorted(range(len(prompts)), key=lambda number: (_is_untouched(prompts[number]), left[number] <= chunk))
    for number in order:
        token_s = prompts[number].compute_s / prompts[number].num_tokens
        if work_s <= 0 or not token_s:
            break
        num_done = min(left[number] - 1, round(work_s / token_s))
        left[number] -= num_done
        work_s -= num_done * token_s
    return [replace(one, num_left=count) for one, count in zip(prompts, left, strict=True)]


def _is_untouched(prompt: Prompt) -> bool:
    return prompt.num_left == prompt.num_tokens


def _runs(prompts: Sequence[Prompt], since: float, chunk: int, budget: int) -> Iterator[Run]:
    left = {number: one.num_left for number, one in enumerate(prompts)}
    time = since
    while left:
        begins = time = max(time, min([prompts[number].placed for number in left]))
        taken = _taken(prompts, left, time, chunk, budget)
        step_s = sum([prompts[number].compute_s * count / prompts[number].num_tokens for number, count in taken])
        num = 1 + _num_alike(prompts, left, taken, time, chunk)
        for _ in range(num):
            time += step_s
        yield Run(begins, step_s, num, time, taken)
        for number, count in taken:
            left[number] -= num * count
            if not left[number]:
                del left[number]


def _num_alike(
    prompts: Sequence[Prompt], left: dict[int, int], taken: list[tuple[int, int]], time: float, chunk: int
) -> int:
    """How many of the steps after this one take the same: as long as all that are left have begun, and have more than a
    chunk left."""
    for number, count in left.items():
        if count <= chunk or count == prompts[number].num_tokens or prompts[number].placed > time:
            return 0
    return min([(left[number] - chunk - 1) // count for number, count in taken])


def _taken(
    prompts: Sequence[Prompt], left: dict[int, int], time: float, chunk: int, budget: int
) -> list[tuple[int, int]]:
    """(number, tokens) of the prompts in the step that begins at this time."""
    here = [number for number in left if prompts[number].placed <= time]
    if len(here) == 1:
        return [(here[0], min(left[here[0]], chunk, budget))]
    begun = [number for number in here if left[number] < prompts[number].num_tokens]
    waiting = [number for number in here if left[number] == prompts[number].num_tokens]
    first = begun[:1]
    taken: dict[int, int] = {}
    room = budget
    for numbers, whole in (
        (first, False),
        ([number for number in begun[1:] if left[number] <= chunk], False),
        (waiting, True),
        (begun[1:], False),
        (waiting, False),
    ):
        for number in numbers:
            count = min(left[number], chunk, room)
            if number not in taken and count > 0 and (count == left[number] or not whole):
                taken[number] = count
                room -= count
    return list(taken.items())
