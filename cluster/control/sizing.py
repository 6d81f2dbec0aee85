"""Sizing: what share of requests is predicted to keep its targets, for every split of the workers. Pure.

For each number of prefill workers (DistServe, OSDI 2024, section 3, takes M/D/1 for a pool of equal prompts; lengths
are not equal, so here it is M/G/k over the histogram):
1. prefill: waits by Sakasegawa's formula for M/M/k, with the arrivals' and the services' variability (Allen and
   Cunneen), exponential given that there is a wait. What would be late is refused, and never gets to decode. The slack
   of decode workers counts as prefill workers;
2. decode: those that are there at a time by Little's law, with the step that so many sequences take; bounded by blocks,
   by seats *and* by what a step may take, whichever is least; how many there are fluctuates like a Poisson count;
3. the link into each decode worker is one more such bound.
The attained share is the product of these. `best` enumerates all splits: there are as many as workers.
`together` is the one without a prefill worker: prompts are computed in the slack of all, which makes each last longer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cluster.control.demand import Demand, Kind
from router.report import StepTable

Floats = NDArray[np.float64]

NEARLY = 1e-4  # of a pool that has exactly as much to do as it can
FOREVER_S, MOST_EXPONENT, MOST = 1e6, 600.0, 1e200
LINK_BUSY = 0.6  # of a link: beyond, transfers wait for several others
USABLE = 0.9  # of the blocks
DEFLECTED = 0.7  # of the slack that there is on average: a chunk needs it at its time
STEP_MARGIN = 0.97  # of a TPOT target
ROUNDS = 40  # to the fixed point of Little's law and the step that so many take
SETTLED = 1e-6  # of a value, by which a round changes it
UNPROMISED_S = 0.2  # a step without a promise may take so long
CROWD = 1e4
FINEST = 1e-9


@dataclass(frozen=True, slots=True)
class Machine:
    """What one worker can do. `kv_tokens`: positions for which it has blocks."""

    steps: StepTable
    kv_tokens: float
    max_batch_seqs: int
    transfer_token_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Bias:
    """By how much demand looks larger or smaller than it is, as what was observed says: factors on work."""

    prefill: float = 1.0
    decode: float = 1.0


NO_BIAS = Bias()


@dataclass(frozen=True, slots=True)
class Split:
    """`attained` of all requests with so many prefill workers, of which `prefill` and `decode` are the pools' parts; 0
    prefill workers: all serve both phases."""

    num_prefill: int
    num_decode: int
    attained: float
    prefill: float
    decode: float

    @property
    def is_together(self) -> bool:
        """Both phases on every worker."""
        return self.num_prefill == 0


def splits(demand: Demand, machine: Machine, num_workers: int, bias: Bias = NO_BIAS) -> list[Split]:
    """Of all splits that leave one worker in each pool, from the fewest prefill workers on."""
    if num_workers < 2:
        return []
    num_prefill = np.arange(1.0, num_workers)
    helped = num_prefill + deflected(demand, machine, num_workers - num_prefill, bias.decode)
    prefill = prefill_share(demand, helped, bias.prefill)
    decode = decode_share(demand, machine, num_workers - num_prefill, prefill, bias.decode)
    attained = prefill * decode
    return [
        Split(int(count), num_workers - int(count), float(attained[place]), float(prefill[place]), float(decode[place]))
        for place, count in enumerate(num_prefill)
    ]


def together(demand: Demand, machine: Machine, num_workers: int, bias: Bias = NO_BIAS) -> Split:
    """Both phases on every worker: the chunks that a step has to take make it longer, and so that there are more who
    decode at a time; a prompt takes as many steps as it has chunks of what fits into what was promised."""
    nobody = Split(0, num_workers, 0.0, 0.0, 0.0)
    limit_s = min(_promised_s(demand), UNPROMISED_S)
    alone = _Steps(machine.steps, _mean_context(demand))
    new_tokens = bias.prefill * sum(kind.share * kind.num_new for kind in demand.kinds)
    steps = _Mixed(alone, machine.steps, demand.rate * new_tokens / num_workers, limit_s)
    size = _batch(
        np.array([demand.rate]), demand.num_output * bias.decode, steps, np.array([float(num_workers)]), CROWD
    )  # fmt: skip
    step_s, mixed_s = float(alone.at(size)[0]), float(steps.at(size)[0])
    fitting = steps.chunk_within(limit_s - step_s)
    if not fitting >= 1.0:
        return nobody
    compute_s = sum(kind.share * kind.compute_s for kind in demand.kinds)
    stretched = new_tokens / fitting * limit_s / max(compute_s, FINEST)  # times as long as alone
    taken = prefill_share(demand, np.array([float(num_workers)]), stretched)
    slowed = _slowed(machine.steps, mixed_s / max(step_s, FINEST))
    decode = float(
        decode_share(
            demand, replace(machine, steps=slowed, transfer_token_s=0.0), np.array([float(num_workers)]), taken,
            bias.decode,
        )[0]
    )  # fmt: skip
    prefill = float(taken[0])
    return Split(0, num_workers, prefill * decode, prefill, decode)


def over_horizon(first: Sequence[Split], then: Sequence[Split]) -> list[Split]:
    """Of demand that goes from one to the other: the mean of both ends."""
    return [
        replace(
            one, attained=(one.attained + other.attained) / 2, prefill=(one.prefill + other.prefill) / 2,
            decode=(one.decode + other.decode) / 2,
        )
        for one, other in zip(first, then, strict=True)
    ]  # fmt: skip


def best(found: Sequence[Split], num_prefill_now: int) -> Split:
    """The split that attains most; of those that are about equal the one that is nearest to what there is."""
    most = max(split.attained for split in found)
    good = [split for split in found if split.attained >= most - 1e-3]
    return min(good, key=lambda split: (abs(split.num_prefill - num_prefill_now), split.num_prefill))


# --- prefill --------------------------------------------------------------------------------------------------


def prefill_share(demand: Demand, num_workers: Floats, bias: float = 1.0) -> Floats:
    """For each number of workers: the share of requests that is taken and gets its first token in time.

    What would be late is refused, and makes nobody wait: of those who would wait too long in a queue that takes all, P,
    so many are lost: (1 - busy) P / (1 - busy P), which is exact for M/M/1 whose customers do not join a queue that is
    too long for them, and goes on to more work than there is time for."""
    weights, service_s = _column(demand, "share"), bias * _column(demand, "compute_s")
    spare_s = _column(demand, "ttft_s") - service_s
    can = spare_s >= 0  # the others are refused whatever the load
    possible = float(weights[can].sum())
    weights, service_s, spare_s = weights[can] / max(possible, FINEST), service_s[can], spare_s[can]
    mean_s = float(weights @ service_s)
    if mean_s <= 0 or demand.rate <= 0:
        return np.full_like(num_workers, possible if demand.rate > 0 else 1.0)
    variability = float(weights @ service_s**2) / mean_s**2 - 1.0
    busy = possible * demand.rate * mean_s / num_workers
    busy = np.where(np.abs(1 - busy) < NEARLY, 1 - NEARLY, busy)
    waits = busy ** (np.sqrt(2 * (num_workers + 1)) - 1)  # the probability of a wait
    decay = 2 * num_workers * (1 - busy) / ((demand.burstiness + variability) * mean_s)  # of how long that is
    exponent = np.minimum(spare_s, FOREVER_S)[:, None] * decay  # [kinds, workers]
    late = np.minimum(waits * (weights @ np.exp(-np.clip(exponent, -MOST_EXPONENT, MOST_EXPONENT))), MOST)
    lost = (1 - busy) * late / (1 - busy * late)
    return possible * (1 - np.clip(lost, np.maximum(0.0, 1 - 1 / busy), 1.0))


# --- decode ---------------------------------------------------------------------------------------------------


def deflected(demand: Demand, machine: Machine, num_workers: Floats, bias: float = 1.0) -> Floats:
    """How many prefill workers the slack of so many decode workers is worth: the part of the time that their steps
    leave free of what was promised, of which the router's chunks get DEFLECTED."""
    limit_s = _promised_s(demand)
    if math.isinf(limit_s) or demand.rate <= 0:
        return np.zeros_like(num_workers)
    table = _Steps(machine.steps, _mean_context(demand))
    size = _batch(demand.rate * np.ones_like(num_workers), demand.num_output * bias, table, num_workers, 1e4)
    return DEFLECTED * num_workers * np.maximum(0.0, 1 - table.at(size) / limit_s)


def _promised_s(demand: Demand) -> float:
    """What a step may take, in the mean over those kinds that have a target; infinite: none has."""
    promised = [(kind.share, kind.tpot_s) for kind in demand.kinds if math.isfinite(kind.tpot_s)]
    if not promised:
        return math.inf
    return STEP_MARGIN * sum(share * tpot_s for share, tpot_s in promised) / sum(share for share, _ in promised)


def _slowed(table: StepTable, times: float) -> StepTable:
    return replace(table, step_s=tuple(tuple(times * step_s for step_s in row) for row in table.step_s))


def _batch(rate: Floats, output: float, table: _Steps | _Mixed, num_workers: Floats, most: float) -> Floats:
    """Sequences of a step, by Little's law: from below, the iteration only rises."""
    size = np.full_like(num_workers, 1.0)
    per_s = rate * output / num_workers
    for _ in range(ROUNDS):
        before, size = size, np.minimum(per_s * table.at(size), most)
        if _is_settled(before, size):
            break
    return size


def _is_settled(before: Floats, after: Floats) -> bool:
    """Would another round change nothing worth it?"""
    return bool((np.abs(after - before) <= SETTLED * after).all())


def decode_share(
    demand: Demand, machine: Machine, num_workers: Floats, taken: Floats, bias: float = 1.0
) -> Floats:  # fmt: skip
    """For each number of workers, of the requests that prefill takes: the share that keeps its steps and has room."""
    rate = demand.rate * taken
    output = demand.num_output * bias
    if output <= 0 or not np.any(rate > 0):
        return np.ones_like(num_workers)
    context = _mean_context(demand)
    table = _Steps(machine.steps, context)
    limits = np.array([_most_in_step(kind, machine, table, context) for kind in demand.kinds])  # [kinds], per worker
    most = max(float(limits.max()), 1.0)
    size = _batch(rate, output, table, num_workers, 2 * most)
    there = rate * output * table.at(np.minimum(size, most))  # sequences in all, as admission lets them in
    room = limits[:, None] * num_workers[None, :]  # [kinds, workers]
    spread = np.sqrt(np.maximum(there, 1.0))
    fits = _normal_cdf((room + 0.5 - there) / spread)
    share = fits + (1 - fits) * np.minimum(1.0, room / np.maximum(there, 1.0))
    share = np.where(limits[:, None] < 1.0, 0.0, share)  # not even one sequence keeps it
    return (_column(demand, "share") @ share) * _link_share(demand, machine, rate, num_workers)


def _mean_context(demand: Demand) -> float:
    """Positions of a sequence that is found in a step: long answers are there for longer."""
    residence = sum(kind.share * kind.num_output for kind in demand.kinds)
    whole = sum(kind.share * kind.num_output * (kind.num_prompt + kind.num_output / 2) for kind in demand.kinds)
    return whole / max(residence, FINEST)


def _most_in_step(kind: Kind, machine: Machine, table: _Steps, context: float) -> float:
    """Sequences on one worker at which this kind keeps its target, has blocks, and a seat."""
    by_blocks = USABLE * machine.kv_tokens / max(context, 1.0)
    gap_s = machine.transfer_token_s * kind.num_prompt / max(1.0, kind.num_output - 1)  # of its average
    by_time = table.most_within(STEP_MARGIN * kind.tpot_s - gap_s) if math.isfinite(kind.tpot_s) else math.inf
    return min(by_blocks, by_time, float(machine.max_batch_seqs))


def _link_share(demand: Demand, machine: Machine, rate: Floats, num_workers: Floats) -> Floats:
    moved = sum(kind.share * kind.num_prompt for kind in demand.kinds) * machine.transfer_token_s
    busy = rate * moved / num_workers
    return np.minimum(1.0, LINK_BUSY / np.maximum(busy, FINEST))


class _Mixed:
    """Steps of those who decode with the chunks of as many tokens a second as come, as far as these fit the limit."""

    def __init__(self, alone: _Steps, table: StepTable, tokens_per_s: float, limit_s: float) -> None:
        self._alone, self._tokens_per_s, self._limit_s = alone, tokens_per_s, limit_s
        self._chunks, self._added_s = np.asarray(table.chunks, dtype=float), np.asarray(table.added_s, dtype=float)

    def at(self, size: Floats) -> Floats:
        step_s = self._alone.at(size)
        mixed_s = step_s
        for _ in range(ROUNDS // 2):
            added_s = np.interp(self._tokens_per_s * mixed_s, self._chunks, self._added_s)
            before_s, mixed_s = mixed_s, np.maximum(step_s, np.minimum(step_s + added_s, self._limit_s))
            if _is_settled(before_s, mixed_s):
                break
        return mixed_s

    def chunk_within(self, left_s: float) -> float:
        """Tokens that make a step no longer than by this."""
        if left_s <= 0:
            return 0.0
        return float(np.interp(left_s, np.maximum.accumulate(self._added_s + FINEST * self._chunks), self._chunks))


class _Steps:
    """Decode steps of sequences with one mean context, linear between what the table has and beyond it."""

    def __init__(self, table: StepTable, context: float) -> None:
        columns = np.asarray(table.contexts, dtype=float)
        rows = np.asarray(table.step_s, dtype=float)
        self._sizes = np.asarray(table.sequences, dtype=float)
        self._step_s = np.array([_linear(columns, row, context) for row in rows])

    def at(self, size: Floats) -> Floats:
        inside = np.interp(size, self._sizes, self._step_s)
        is_beyond = size > self._sizes[-1]
        return np.where(is_beyond, self._beyond(size), inside) if is_beyond.any() else inside

    def most_within(self, limit_s: float) -> float:
        """Sequences at which a step still takes no longer; 0: one is too many."""
        if self._step_s[0] > limit_s:
            return 0.0
        late = np.flatnonzero(self._step_s > limit_s)
        if not late.size:
            return float(self._sizes[-1])
        after = int(late[0])
        low, high = self._step_s[after - 1], self._step_s[after]
        part = (limit_s - low) / max(high - low, FINEST)
        return float(self._sizes[after - 1] + part * (self._sizes[after] - self._sizes[after - 1]))

    def _beyond(self, size: Floats) -> Floats:
        if self._sizes.size < 2:
            return np.full_like(size, self._step_s[-1])
        slope = (self._step_s[-1] - self._step_s[-2]) / max(self._sizes[-1] - self._sizes[-2], FINEST)
        return self._step_s[-1] + np.maximum(slope, 0.0) * (size - self._sizes[-1])


def _linear(places: Floats, values: Floats, at: float) -> float:
    """Between two places, and beyond the last as between the last two."""
    if at <= places[-1] or places.size < 2:
        return float(np.interp(at, places, values))
    slope = (values[-1] - values[-2]) / (places[-1] - places[-2])
    return float(values[-1] + max(slope, 0.0) * (at - places[-1]))


def _normal_cdf(values: Floats) -> Floats:
    """Of the standard normal, by the logistic curve that is within 0.01 of it."""
    return 1 / (1 + np.exp(-np.clip(1.702 * values, -60, 60)))


def _column(demand: Demand, name: str) -> Floats:
    return np.array([getattr(kind, name) for kind in demand.kinds], dtype=float)
