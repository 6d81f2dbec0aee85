"""The planner: whether a worker should change its pool now, and which. Pure: what was seen and what is remembered in, a
plan and what to remember out.

1. what is missing, stale or absurd means hold, and so does a flip that is under way;
2. demand is that of the window, at the rate and with the lengths that are forecast a horizon ahead (forecast.py); in
   need, when refusals or queues say that a pool is short now, that of the last seconds;
3. all splits are rated (sizing.py), with demand corrected by what was observed (bias.py);
4. a step towards the best one is wished for when its gain over the horizon exceeds its cost by a margin, and it is done
   when it was wished for several times in a row, in need at once, and no earlier flip is too recent;
5. the victim is who costs least: from prefill the one with the shortest queue, from decode the one with the fewest
   tokens stored;
6. where no flip is wished for, the number of workers may change (scale.py).
Each pool keeps one worker, and a pool that is empty gets one at once. But where no split does as well as both phases on
every worker (few devices, or targets that leave much slack), and that is allowed, all become decode workers, which
compute prompts beside: a split of no prefill workers, so that a pool without one to prefill is nothing to be mended.
A way back waits for longer than a cooldown, in need, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.control.bias import NO_FEEDBACK, Feedback
from cluster.control.demand import Demand
from cluster.control.forecast import Forecast
from cluster.control.outlook import COMPUTE, OUTPUT, RATE, Outlook, outlook_of
from cluster.control.rules import ControllerConfig
from cluster.control.scale import IMPATIENT, Patience, Resize, resize
from cluster.control.seen import Need, Seen, absurd, burden, pool_of
from cluster.control.sizing import Machine, Split, best
from engine.types import Role
from router.report import WorkerStand

FLIP_S = 0.3  # that a worker serves neither pool
CACHE_LOST = 0.25  # of what a worker has cached: the rest is fetched from it


@dataclass(frozen=True, slots=True)
class Flip:
    """This life of a worker is to serve another pool. `cost` and `gain` in requests that keep their targets."""

    worker_id: str
    incarnation: str
    to: Role
    gain: float
    cost: float


@dataclass(frozen=True, slots=True)
class Plan:
    """`flip` is None when all stays; `reason` says why in either case. `now`: the split as it is, and `best` as it
    should be, by what was predicted; None when that was not asked."""

    reason: str
    flip: Flip | None = None
    now: Split | None = None
    best: Split | None = None
    rate: float = 0.0
    need: Need = Need.NONE
    resize: Resize | None = None  # of a plan without a flip


@dataclass(frozen=True, slots=True)
class Memory:
    """What one decision leaves to the next."""

    series: tuple[Forecast, ...] = (Forecast(), Forecast(), Forecast())
    bucket_until: float = -math.inf
    feedback: Feedback = NO_FEEDBACK
    wish: tuple[str, str] = ("", "")  # a cohort, and the role that it is to have more of
    num_wishes: int = 0  # in a row
    flipped_at: float = -math.inf
    flipped: tuple[str, str] = ("", "")  # the wish that was done then
    patience: Patience = IMPATIENT
    begun_at: float = math.inf  # when it was seen first


def plan(seen: Seen, memory: Memory, rules: ControllerConfig) -> tuple[Plan, Memory]:
    if len({worker.cohort for worker in seen.workers}) > 1:  # the router serves both phases on all, or on none
        rules = rules.model_copy(update={"together": False})
    if fault := absurd(seen, rules):
        return Plan(f"hold: {fault}"), replace(memory, num_wishes=0, patience=IMPATIENT)
    memory = _with_buckets(seen, replace(memory, begun_at=min(memory.begun_at, seen.now)), rules)
    if seen.is_flipping:
        frozen = memory.feedback.frozen(seen, rules)
        return Plan("hold: a flip is under way"), replace(memory, num_wishes=0, feedback=frozen)
    for cohort in seen.cohorts:
        found = _empty_pool(seen, memory, cohort, rules)
        if found is not None:
            wish = (cohort, str(found.flip.to) if found.flip is not None else "")
            return found, replace(memory, num_wishes=0, flipped_at=seen.now, flipped=wish)
    outlooks = {cohort: outlook_of(seen, memory.series, cohort, rules, rules.fewest) for cohort in seen.cohorts}
    plans = [_plan_cohort(seen, memory, rules, cohort, outlook) for cohort, outlook in outlooks.items()]
    if not plans:
        return Plan("hold: no cohort has two workers"), replace(memory, num_wishes=0)
    chosen, feedback = max(plans, key=lambda one: one[0].flip.gain - one[0].flip.cost if one[0].flip else -math.inf)
    memory = replace(memory, feedback=feedback)
    if chosen.flip is None:
        decided, memory = chosen, replace(memory, wish=("", ""), num_wishes=0)
    else:
        decided, memory = _confirmed(seen, memory, rules, chosen, chosen.flip)
    return _resized(seen, memory, rules, decided, outlooks)


def _resized(
    seen: Seen, memory: Memory, rules: ControllerConfig, decided: Plan, outlooks: dict[str, Outlook | None]
) -> tuple[Plan, Memory]:
    """The plan, with a change of the number of workers if it is time for one and no flip is done now."""
    if not rules.scale.is_on or len(outlooks) != 1:
        return decided, memory
    ((cohort, outlook),) = outlooks.items()
    outlook = outlook or outlook_of(seen, memory.series, cohort, rules, fewest=1)
    is_idle = outlook is None and not seen.num_arrived(rules.window_s) and seen.now - memory.begun_at >= rules.window_s
    if outlook is None and (seen.machine(cohort) is None or not is_idle):
        return decided, replace(memory, patience=IMPATIENT)
    bias = memory.feedback.bias
    rated = None if outlook is None else lambda num, times: outlook.rated(num, bias, times)
    wished, patience = resize(seen, rated, memory.patience, rules.scale, rules.dead_band)
    if wished is None or decided.flip is not None:
        return decided, replace(memory, patience=patience if decided.flip is None else memory.patience)
    return replace(decided, reason=f"resize: {wished}", resize=wished), replace(memory, patience=patience)


def _confirmed(seen: Seen, memory: Memory, rules: ControllerConfig, wished: Plan, flip: Flip) -> tuple[Plan, Memory]:
    """Is it time? A wish that is not the same as before begins to count anew."""
    wish = seen.cohort_of(flip.worker_id), str(flip.to)
    num_wishes = memory.num_wishes + 1 if wish == memory.wish else 1
    memory = replace(memory, wish=wish, num_wishes=num_wishes)
    is_way_back = memory.flipped[0] == wish[0] and memory.flipped != wish
    left_s = memory.flipped_at + (rules.way_back_s if is_way_back else rules.cooldown_s) - seen.now
    if left_s > 0:
        return replace(wished, flip=None, reason=f"hold: {left_s:.1f} s since the last flip are missing"), memory
    if wished.need is Need.NONE and num_wishes < rules.confirmations:
        return replace(wished, flip=None, reason=f"hold: wished {num_wishes} of {rules.confirmations} times"), memory
    return wished, replace(memory, wish=("", ""), num_wishes=0, flipped_at=seen.now, flipped=wish)


# --- one cohort -----------------------------------------------------------------------------------------------


def _plan_cohort(
    seen: Seen, memory: Memory, rules: ControllerConfig, cohort: str, outlook: Outlook | None
) -> tuple[Plan, Feedback]:
    workers = seen.workers_of(cohort)
    prefill, decode = pool_of(workers, Role.PREFILL), pool_of(workers, Role.DECODE)
    feedback = memory.feedback
    if not decode or not (prefill or rules.together):
        return Plan("hold: a pool has no worker, and may get its own back"), feedback
    if outlook is None:
        return Plan("hold: too few requests to judge by"), feedback
    demand, need = outlook.demand, outlook.need
    at_present = outlook.rated_now(len(workers), feedback.bias)
    rated = outlook.rated(len(workers), feedback.bias, now=at_present)
    place = next(index for index, split in enumerate(rated) if split.num_prefill == len(prefill))
    now = rated[place]
    feedback = feedback.after(seen, at_present[place], rules)
    wanted = _wanted(rated, len(prefill), rules)
    known = Plan("", None, now, wanted, demand.rate, need)
    if wanted.num_prefill == now.num_prefill or wanted.attained - now.attained < rules.dead_band:
        right = "no split does better than both phases on every worker" if now.is_together else "the split is right"
        return replace(known, reason=f"hold: {right}"), feedback
    to = Role.PREFILL if wanted.num_prefill > now.num_prefill else Role.DECODE
    if need not in (Need.NONE, Need.of(to)):
        return replace(known, reason=f"hold: {need} is short, and the forecast wishes for {to}"), feedback
    giver = [one for one in (decode if to is Role.PREFILL else prefill) if one.takes_requests]
    if len(giver) < 2 and not (giver and wanted.is_together and to is Role.DECODE):
        return replace(known, reason="hold: each pool keeps one worker"), feedback
    victim = min(giver, key=lambda one: (burden(one), one.worker_id))
    num_steps = abs(wanted.num_prefill - now.num_prefill)
    gain = (wanted.attained - now.attained) / num_steps * demand.rate * rules.horizon_s
    cost = _cost(victim, demand, outlook.machine, len(workers))
    if gain <= rules.margin * cost:
        return replace(known, reason=f"hold: a gain of {gain:.2f} requests is not worth a cost of {cost:.2f}"), feedback
    flip = Flip(victim.worker_id, victim.incarnation, to, gain, cost)
    return replace(known, reason=f"flip towards {_said(wanted)}", flip=flip), feedback


def _wanted(rated: Sequence[Split], num_prefill: int, rules: ControllerConfig) -> Split:
    """The best one; without prefill workers only if that is clearly better than with some, or is so now, and if the
    next step on the way there loses nothing: whoever is half way there has neither."""
    apart = [split for split in rated if not split.is_together]
    wanted = best(apart, num_prefill)
    kept = {split.num_prefill: split.attained for split in rated}
    if len(apart) == len(rated) or (num_prefill and kept[num_prefill - 1] < kept[num_prefill]):
        return wanted
    least = wanted.attained + (rules.dead_band if num_prefill else -rules.dead_band)
    return rated[0] if rated[0].attained >= least else wanted


def _said(split: Split) -> str:
    return "both phases on every worker" if split.is_together else f"{split.num_prefill} + {split.num_decode}"


def _cost(victim: WorkerStand, demand: Demand, machine: Machine, num_workers: int) -> float:
    """In requests: service lost, KV moved, cache lost."""
    rate = demand.rate / num_workers
    moved_s = victim.num_tokens * machine.transfer_token_s
    block_tokens = machine.kv_tokens / max(1, victim.num_blocks)
    mean_prompt = sum(kind.share * kind.num_prompt for kind in demand.kinds)
    lost = CACHE_LOST * demand.cached_share * victim.num_cached_blocks * block_tokens / max(1.0, mean_prompt)
    return rate * (FLIP_S + moved_s) + min(lost, rate * FLIP_S * 10)


def _empty_pool(seen: Seen, memory: Memory, cohort: str, rules: ControllerConfig) -> Plan | None:
    """A pool without a worker, for longer than one takes to come back. Without one to prefill all may be well."""
    workers = seen.workers_of(cohort)
    if seen.now - memory.flipped_at < rules.cooldown_s or seen.is_incomplete:
        return None
    for role, giver in ((Role.PREFILL, Role.DECODE), (Role.DECODE, Role.PREFILL)):
        givers = pool_of(workers, giver)
        if not pool_of(workers, role) and len(givers) > 1 and not (role is Role.PREFILL and rules.together):
            victim = min(givers, key=lambda one: (burden(one), one.worker_id))
            return Plan(
                f"flip: no worker is left to {role}", Flip(victim.worker_id, victim.incarnation, role, 0.0, 0.0)
            )
    return None


# --- series ---------------------------------------------------------------------------------------------------


def _with_buckets(seen: Seen, memory: Memory, rules: ControllerConfig) -> Memory:
    """The values of the buckets that have become full since."""
    until, size = memory.bucket_until, rules.bucket_s
    if not math.isfinite(until) or seen.now - until > rules.window_s:
        return replace(memory, bucket_until=seen.now)
    horizon = max(1, round(rules.horizon_s / size))
    series = [replace(one, horizon=horizon) for one in memory.series]
    for _ in range(int((seen.now - until) / size)):
        arrived = seen.sample_between(until, until + size)
        series[RATE] = series[RATE].then(seen.num_between(until, until + size) / size)
        if arrived:
            series[COMPUTE] = series[COMPUTE].then(sum(one.compute_s for one in arrived) / len(arrived))
            series[OUTPUT] = series[OUTPUT].then(sum(one.num_output for one in arrived) / len(arrived))
        until += size
    return replace(memory, series=tuple(series), bucket_until=until)
