"""How many workers there should be: the remedy when no split of those there are is enough. Pure, and slower than flips.

1. too few: the best split of all workers, those to come included, attains less than the goal, and more workers attain
   clearly more. When that has been so for `add_after_s`, so many come at once as attain it; they begin in the pools
   that the best split of all of them is short of;
2. too many: one worker less would attain the goal, or as much as the most workers would, even of more demand than there
   is; or nothing comes at all. When that has been so for `remove_after_s`, one leaves: one that was added and has not
   come yet, else from the pool that the best split of the others has fewer in, whoever has least to move;
3. there are never fewer than `min_workers` nor more than `max_workers`, those that are being replaced or that are just
   leaving included. While a worker is listed that nobody has reported on yet, the number stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cluster.control.rules import ScaleConfig
from cluster.control.seen import Seen, burden, pool_of
from cluster.control.sizing import Split, best
from engine.types import Role

ALIKE = 0.01  # of what the most workers attain: more would not be worth it
LEAST = 0.5  # attained: where it is less, that one worker less attains no less either is no reason to let it go
Rated = Callable[[int, float], Sequence[Split]]  # all splits of so many workers, for so many times the demand


@dataclass(frozen=True, slots=True)
class Resize:
    """`add`: workers that are to come, by the pools that they begin in. `remove`: one that is to leave, and which life
    of it; without a life it has not come yet."""

    add: tuple[Role, ...] = ()
    remove: str = ""
    incarnation: str = ""

    def __str__(self) -> str:
        if self.remove:
            return f"{self.remove} leaves"
        return " and ".join(f"{self.add.count(role)} more to {role}" for role in dict.fromkeys(self.add))


@dataclass(frozen=True, slots=True)
class Patience:
    """What one decision leaves to the next: since when there have been too few, or too many."""

    short_since: float | None = None
    spare_since: float | None = None


IMPATIENT = Patience()


def resize(
    seen: Seen, rated: Rated | None, patience: Patience, rules: ScaleConfig, dead_band: float
) -> tuple[Resize | None, Patience]:
    """`rated` is None when nothing came of late. Of workers of one cohort."""
    fewest, most = rules.min_workers, rules.max_workers
    num = seen.num_workers + len(seen.coming)
    if seen.num_unreported:
        return None, patience
    if fewest is None or most is None or not 2 <= fewest <= most:
        return None, IMPATIENT
    now = best(rated(num, 1.0), 0) if rated is not None and num >= 2 else None
    room = most - num - seen.num_leaving
    enough = _enough(rated, most, now, rules.goal) if rated is not None and now is not None else 0.0
    is_short = now is not None and now.attained < enough - max(0.0, dead_band - ALIKE)
    is_spare = num > fewest and not is_short and (rated is None or _is_spare(rated, num, now, rules.spare, enough))
    patience = Patience(
        _since(patience.short_since, seen.now) if is_short else None,
        _since(patience.spare_since, seen.now) if is_spare else None,
    )
    if rated is not None and now is not None and _is_due(patience.short_since, seen.now, rules.add_after_s):
        coming = _added(seen, rated, num, room, enough) if room > 0 else ()
        return (Resize(coming) if coming else None), replace(patience, short_since=seen.now)
    if _is_due(patience.spare_since, seen.now, rules.remove_after_s):
        return _removed(seen, rated, num), replace(patience, spare_since=None)
    return None, patience


def _since(before: float | None, now: float) -> float:
    return now if before is None else before


def _is_due(since: float | None, now: float, after_s: float) -> bool:
    return since is not None and now - since >= after_s


def _enough(rated: Rated, most: int, now: Split, goal: float) -> float:
    """To attain: the goal or, where that is out of reach, about what the most workers would."""
    return goal if now.attained >= goal else min(goal, best(rated(most, 1.0), 0).attained - ALIKE)


def _is_spare(rated: Rated, num: int, now: Split | None, times: float, enough: float) -> bool:
    if now is None or num - 1 < 2 or now.attained < LEAST:
        return False
    return best(rated(num - 1, times), 0).attained >= enough


# --- more -----------------------------------------------------------------------------------------------------


def _added(seen: Seen, rated: Rated, num: int, room: int, enough: float) -> tuple[Role, ...]:
    """The fewest that attain enough, as far as there is room. Sought by doubling, then halving: what is attained grows
    with the number, but for noise."""
    too_few, count = 0, 1
    while count < room and best(rated(num + count, 1.0), 0).attained < enough:
        too_few, count = count, 2 * count
    count = min(count, room)
    while count - too_few > 1:
        middle = (too_few + count) // 2
        is_enough = best(rated(num + middle, 1.0), 0).attained >= enough
        too_few, count = (too_few, middle) if is_enough else (middle, count)
    return _roles(seen, best(rated(num + count, 1.0), 0), count)


def _roles(seen: Seen, wanted: Split, count: int) -> tuple[Role, ...]:
    prefill = len(pool_of(seen.workers, Role.PREFILL)) + sum(name.startswith(Role.PREFILL) for name in seen.coming)
    num_prefill = min(count, max(0, wanted.num_prefill - prefill))
    return (Role.PREFILL,) * num_prefill + (Role.DECODE,) * (count - num_prefill)


# --- fewer ----------------------------------------------------------------------------------------------------


def _removed(seen: Seen, rated: Rated | None, num: int) -> Resize | None:
    if seen.new:
        return Resize(remove=seen.new[-1])
    there = [worker for worker in seen.workers if worker.takes_requests]
    prefill, decode = pool_of(there, Role.PREFILL), pool_of(there, Role.DECODE)
    wanted = best(rated(num - 1, 1.0), len(prefill)).num_prefill if rated is not None else min(len(prefill), num // 2)
    giver = prefill if len(prefill) > wanted else decode
    giver = giver if len(giver) > 1 else (decode if giver is prefill else prefill)
    if len(giver) < 2 or len(seen.coming) > len(seen.new):
        return None  # each pool keeps one; and who is being replaced may be the one that would be missed
    victim = min(giver, key=lambda one: (burden(one), one.worker_id))
    return Resize(remove=victim.worker_id, incarnation=victim.incarnation)
