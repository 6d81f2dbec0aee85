"""Bursts: decode steps between two events, advanced together.

1. `plan_burst` looks at a batch in which every running sequence decodes and nobody waits: the steps that end none of
   them, need no block that is not there, and end by a given time can only go one way;
2. while they last nothing is computed. Whoever asks what an engine would have reported by now gets `Burst.stats_by`;
3. `fast_forward` brings the engine where so many single steps would have brought it: the same blocks in the same order
   under the same names.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from collections.abc import Sequence as Sequences
from dataclasses import dataclass, fields
from itertools import accumulate, groupby
from operator import attrgetter

from cluster.simulator.service_times.model import ServiceTimes
from engine.engine import Engine
from engine.scheduler import Batch
from engine.sequence import Sequence
from engine.step_shape import StepRecord, StepShape
from engine.types import EngineStats, Request, TokenOutput

_STATS = [field.name for field in fields(EngineStats)]
_NUM_FREE_BLOCKS, _NUM_STEPS = _STATS.index("num_free_blocks"), _STATS.index("num_steps")
_stats_values = attrgetter(*_STATS)

SHORTEST = 2  # steps
LONGEST = 4096


@dataclass(slots=True)
class TimedOutput(TokenOutput):
    """Tokens of several steps. `times`: when each was made, or, at the gateway, came."""

    times: tuple[float, ...] = ()


@dataclass(slots=True, eq=False)
class Burst:
    """`ends[i]` is when step i ends, from 0; `crossings` the numbers of steps, from 1, after which a sequence's block
    is full, one entry for each. `told`: the engine's report before its first step."""

    sequences: tuple[Sequence, ...]
    shape: StepShape  # of its first step
    begun: float
    ends: list[float]
    steps_s: list[float]
    crossings: list[int]
    told: EngineStats
    begins_with: EngineStats  # what its first step has to do: who waited when that was told may be in it
    num_free: int  # blocks, at its begin
    num_done: int = 0  # steps that the engine has been brought forward
    last_told: tuple[int, EngineStats] | None = None  # the report after so many steps, as asked for last

    def shape_of(self, index: int) -> StepShape:
        """Every sequence reads a position more each step."""
        return StepShape((), self.shape.num_decoding, self.shape.num_context + index * self.shape.num_decoding)

    def num_ended(self, now: float) -> int:
        return bisect_right(self.ends, now)

    def stats_after(self, num_steps: int) -> EngineStats:
        """The engine's report after so many of its steps (0: the one before)."""
        if num_steps == 0:
            return self.told
        if self.last_told is None or self.last_told[0] != num_steps:
            num_free = self.num_free - bisect_left(self.crossings, num_steps)
            self.last_told = (num_steps, _moved_on(self.begins_with, num_free, self.told.num_steps + num_steps))
        return self.last_told[1]

    def stats_by(self, told: EngineStats, now: float) -> EngineStats | None:
        """What has been reported by now, if the last report `told` is of this burst."""
        known = told.num_steps - self.told.num_steps
        if not 0 <= known < len(self.ends):
            return None
        num_steps = self.num_ended(now)
        return told if num_steps <= known else self.stats_after(num_steps)


def plan_burst(
    engine: Engine, batch: Batch, times: ServiceTimes, told: EngineStats, now: float, until: float
) -> Burst | None:
    """The burst that begins with this batch, whose blocks are taken already; None if there is none worth it."""
    sequences = tuple(item.sequence for item in batch.scheduled)
    if not _is_plain(engine, batch, sequences):
        return None
    num_steps = min(LONGEST, *(_num_silent(sequence, engine.spec.max_context) for sequence in sequences))
    if num_steps < SHORTEST:
        return None
    crossings = _crossings(sequences, engine.spec.limits.block_size, num_steps)
    num_free = engine.blocks.num_available
    if bisect_left(crossings, num_steps) > num_free:
        num_steps = crossings[num_free]
    shape = batch.shape
    steps_s = times.decode_steps_s(shape.num_decoding, shape.num_context, num_steps)
    ends = list(accumulate(steps_s, initial=now))[1:]
    del ends[bisect_right(ends, until) :]
    if len(ends) < SHORTEST:
        return None
    return Burst(sequences, shape, now, ends, steps_s, crossings, told, engine.stats(), num_free)


def fast_forward(
    engine: Engine, burst: Burst, num_steps: int, tokens: Callable[[Request, int, int], tuple[int, ...]], goes_on: bool
) -> tuple[TimedOutput, ...]:
    """Bring the engine to after so many steps of the burst, and if this `goes_on`, to where it has begun the next;
    returns what came out since the last call."""
    first, burst.num_done = burst.num_done, num_steps
    firsts = [sequence.num_generated for sequence in burst.sequences]
    size = engine.spec.limits.block_size
    fresh = [
        tokens(sequence.request, index, num_steps - first)
        for sequence, index in zip(burst.sequences, firsts, strict=True)
    ]
    starts = [sequence.computed for sequence in burst.sequences]
    events = [
        (step, order)
        for order, start in enumerate(starts)
        for step in range(size - start % size, num_steps - first + 1, size)
    ]
    for step, crossing in groupby(sorted(events), key=lambda event: event[0]):
        crossed = [order for _, order in crossing]
        for order in crossed:
            _advance(burst.sequences[order], fresh[order], starts[order], step)
            engine.scheduler.holdings.name_full(burst.sequences[order])
        for order in crossed if goes_on or first + step < num_steps else ():
            sequence = burst.sequences[order]
            is_there = engine.scheduler.holdings.extend(sequence, sequence.computed + 1)
            assert is_there, "the blocks were counted"
    for sequence, new, start in zip(burst.sequences, fresh, starts, strict=True):
        _advance(sequence, new, start, num_steps - first)
    _pass_time(engine, burst, range(first, num_steps))
    times = tuple(burst.ends[first:num_steps])
    return tuple(
        TimedOutput(sequence.key, index, new, cached_tokens=sequence.cached_tokens, times=times)
        for sequence, index, new in zip(burst.sequences, firsts, fresh, strict=True)
    )


def _pass_time(engine: Engine, burst: Burst, steps: range) -> None:
    """As Engine.learn does it, step by step, so that sums are equal to the last bit."""
    slack = engine.scheduler.slack
    for index in steps:
        engine.num_steps += 1
        slack.pass_time(burst.steps_s[index])
        if engine.is_sample:
            slack.pace.learn(StepRecord(burst.shape_of(index), burst.steps_s[index]))


def _moved_on(told: EngineStats, num_free_blocks: int, num_steps: int) -> EngineStats:
    """dataclasses.replace, at a third of its cost: it is asked for all workers whenever a request is placed."""
    values = list(_stats_values(told))
    values[_NUM_FREE_BLOCKS], values[_NUM_STEPS] = num_free_blocks, num_steps
    return EngineStats(*values)


def _is_plain(engine: Engine, batch: Batch, sequences: Sequences[Sequence]) -> bool:
    """Does each step compute one token of every sequence there is, and nothing else?"""
    scheduler, limits = engine.scheduler, engine.spec.limits
    alone = len(sequences) == len(scheduler.running) and not scheduler.waiting and not batch.copies
    simple = not limits.lookahead and all(group.window is None for group in limits.groups)
    return alone and simple and all(map(_only_decodes, sequences))


def _only_decodes(sequence: Sequence) -> bool:
    stops = sequence.request.sampling.stop_token_ids
    return sequence.is_decoding and not (sequence.handoff or sequence.is_joint or stops)


def _num_silent(sequence: Sequence, max_context: int) -> int:
    """Steps before the one that ends the sequence."""
    most = sequence.request.sampling.max_tokens
    return min(most - sequence.num_generated, max_context - len(sequence.tokens)) - 1


def _crossings(sequences: Sequences[Sequence], block_size: int, num_steps: int) -> list[int]:
    return sorted(
        step
        for sequence in sequences
        for step in range(block_size - sequence.computed % block_size, num_steps + 1, block_size)
    )


def _advance(sequence: Sequence, fresh: tuple[int, ...], start: int, num_steps: int) -> None:
    """To after `num_steps` from the position `start`, whose token is known."""
    known = len(sequence.tokens) - 1 - start
    sequence.tokens += fresh[known:num_steps]
    sequence.computed = start + num_steps
