"""The planner: when a worker changes its pool, which, and when everything stays as it is."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.control.planner import Flip, Memory, Plan, plan
from cluster.control.rules import ControllerConfig
from cluster.control.seen import Need, Seen
from engine.types import Role
from router.arrivals import Arrived, Fared
from router.report import StepTable, WorkerStand
from tests.cluster.control.cases import COHORT, arrived, pools, refused, seen, steady, table, worker

RULES = ControllerConfig(confirmations=3, together=False)
TOGETHER = ControllerConfig(confirmations=3, together=True)
LONG_PROMPTS = {"num_prompt": 14_000, "num_output": 10.0, "ttft_s": 3.0}  # 1.4 s each
LONG_ANSWERS = {"num_prompt": 200, "num_output": 1000.0, "tpot_s": 0.02}


def at_rest(**fields: float) -> Seen:
    """A minute of arrivals at 2 + 2 workers."""
    rate = fields.pop("rate", 3.0)
    return seen(100.0, pools(2, 2), steady(rate, 35.0, 100.0, **fields))


def play(look: Seen, ticks: int, rules: ControllerConfig = RULES) -> list[Plan]:
    """The same again, a second later each time."""
    plans, memory = [], Memory()
    for tick in range(ticks):
        moved = tuple(replace(one, at=one.at + tick) for one in look.arrived)
        fared = tuple(replace(one, at=one.at + tick) for one in look.fared)
        now = look.now + tick
        decided, memory = plan(replace(look, now=now, reported_at=now, arrived=moved, fared=fared), memory, rules)
        plans.append(decided)
    return plans


def flips(plans: list[Plan]) -> list[Flip]:
    return [one.flip for one in plans if one.flip is not None]


def test_long_prompts_call_for_a_prefill_worker_once_that_is_confirmed() -> None:
    plans = play(at_rest(**LONG_PROMPTS), 5)
    assert [one.flip is not None for one in plans[:3]] == [False, False, True]
    flip = flips(plans)[0]
    assert flip.to is Role.PREFILL
    assert flip.worker_id in ("w2", "w3")
    assert flip.gain > RULES.margin * flip.cost


def test_long_answers_call_for_a_decode_worker() -> None:
    wished = flips(play(at_rest(rate=7.0, **LONG_ANSWERS), 5))
    assert wished
    assert wished[0].to is Role.DECODE


LOOSE = {"num_prompt": 3000, "num_output": 150.0, "ttft_s": 4.0, "tpot_s": 0.1}
MIXED = StepTable(
    table().sequences, table().contexts, table().step_s, (0, 256, 1024, 4096), (0.0, 0.005, 0.06, 0.38)
)  # fmt: skip


def two(num_prefill: int, **fields: float) -> Seen:
    """A minute of arrivals at two workers whose decode steps read the weights that a chunk beside them reads, too."""
    look = seen(100.0, pools(num_prefill, 2 - num_prefill), steady(fields.pop("rate"), 35.0, 100.0, **fields))
    return replace(look, tables=((COHORT, MIXED),))


def test_where_no_split_does_as_well_both_phases_are_served_on_every_worker() -> None:
    plans = play(two(1, rate=6.0, **LOOSE), 5, TOGETHER)
    assert [(one.worker_id, one.to) for one in flips(plans)] == [("w0", Role.DECODE)]
    assert "both phases on every worker" in flips_of(plans)[0].reason
    assert plans[-1].best is not None
    assert plans[-1].best.is_together
    assert not flips(play(two(1, rate=6.0, **LOOSE), 5, RULES))


def test_who_serves_both_phases_stays_so_and_says_so() -> None:
    plans = play(two(0, rate=6.0, **LOOSE), 20, TOGETHER)
    assert not flips(plans)
    assert plans[-1].reason == "hold: no split does better than both phases on every worker"


def test_and_parts_again_when_first_tokens_have_to_come_soon() -> None:
    tight = LOOSE | {"ttft_s": 0.4, "tpot_s": 0.012}
    assert flips(play(two(0, rate=1.5, **tight), 5, TOGETHER))[0].to is Role.PREFILL


def test_a_pool_is_not_given_up_for_little() -> None:
    """All is well with a split."""
    assert not flips(play(two(1, rate=0.5, **LOOSE), 20, TOGETHER))


def flips_of(plans: list[Plan]) -> list[Plan]:
    return [one for one in plans if one.flip is not None]


def test_what_fits_stays_as_it_is() -> None:
    plans = play(at_rest(rate=1.0), 30)
    assert not flips(plans)
    assert plans[-1].reason == "hold: the split is right"


def test_after_a_flip_the_next_one_waits() -> None:
    plans = play(at_rest(**LONG_PROMPTS), 20)
    times = [tick for tick, one in enumerate(plans) if one.flip is not None]
    assert times[1] - times[0] >= RULES.cooldown_s
    assert any("since the last flip" in one.reason for one in plans)


def test_the_victim_is_who_has_least_to_move() -> None:
    look = at_rest(**LONG_PROMPTS)
    busy = [replace(one, num_tokens=5000.0) if one.worker_id == "w2" else one for one in look.workers]
    assert flips(play(replace(look, workers=tuple(busy)), 4))[0].worker_id == "w3"
    queue = [replace(one, queued_s=9.0) if one.worker_id == "w0" else one for one in look.workers]
    longer = at_rest(rate=7.0, **LONG_ANSWERS)
    assert flips(play(replace(longer, workers=tuple(queue)), 4))[0].worker_id == "w1"


def test_each_pool_keeps_one_worker() -> None:
    look = replace(at_rest(rate=20.0, **LONG_PROMPTS), workers=tuple(pools(3, 1)))
    assert not flips(play(look, 10))


def test_in_need_one_wish_is_enough() -> None:
    look = at_rest(**LONG_PROMPTS)
    late = replace(look, fared=refused(99.0, "ttft", 5))
    decided = play(late, 1)[0]
    assert decided.need is Need.PREFILL
    assert decided.flip is not None


def test_when_both_pools_are_short_there_is_no_need_that_a_flip_could_meet() -> None:
    look = at_rest(**LONG_PROMPTS)
    both = replace(look, fared=(*refused(99.0, "ttft", 5), *refused(99.5, "blocks", 5)))
    assert play(both, 1)[0].need is Need.NONE


def test_a_pool_without_a_worker_gets_one_at_once() -> None:
    gone = seen(100.0, [worker("w2", Role.DECODE), worker("w3", Role.DECODE, num_tokens=10.0)], ())
    decided, _ = plan(gone, Memory(), RULES)
    assert decided.flip is not None
    assert (decided.flip.worker_id, decided.flip.to) == ("w2", Role.PREFILL)


def test_while_one_is_being_replaced_a_pool_stays_empty() -> None:
    gone = seen(100.0, [worker("w2", Role.DECODE), worker("w3", Role.DECODE)], (), is_incomplete=True)
    decided, _ = plan(gone, Memory(), RULES)
    assert decided.flip is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"reported_at": 90.0}, "not heard"),
        ({"reported_at": math.nan}, "not heard"),
        ({"now": math.nan}, "the time"),
        ({"workers": ()}, "no worker"),
        ({"workers": (worker("w0", Role.PREFILL), worker("w0", Role.DECODE))}, "twice"),
        ({"workers": (worker("w0", Role.PREFILL), worker("w1", Role.DECODE, queued_s=math.nan))}, "absurd"),
        ({"workers": (worker("w0", Role.PREFILL), worker("w1", Role.DECODE, num_free_blocks=9999))}, "absurd"),
        ({"arrived": (arrived(99.0, num_output=math.inf),)}, "absurd"),
        ({"tables": ((COHORT, StepTable((1,), (64,), ((math.nan,),))),)}, "absurd"),
        ({"transfer_token_s": -1.0}, "absurd"),
        ({"is_flipping": True}, "under way"),
        ({"arrived": ()}, "too few"),
        ({"tables": ()}, "too few"),
    ],
)
def test_what_is_missing_or_absurd_means_hold(fields: dict[str, object], words: str) -> None:
    look = replace(at_rest(**LONG_PROMPTS), **fields)
    decided, _ = plan(look, Memory(), RULES)
    assert decided.flip is None
    assert words in decided.reason


# --- whatever is seen -----------------------------------------------------------------------------------------

ANY = st.one_of(st.floats(), st.floats(0, 1e6), st.just(0.0))
COUNTS = st.integers(-5, 10**9)
STANDS = st.builds(
    WorkerStand, st.sampled_from([f"w{index}" for index in range(6)]), st.just("i"), st.sampled_from(["c", "d"]),
    st.sampled_from(Role), st.integers(0, 9), st.booleans(), ANY, COUNTS, ANY, COUNTS, COUNTS, COUNTS,
)  # fmt: skip
ARRIVALS = st.builds(Arrived, st.floats(0, 100), COUNTS, COUNTS, ANY, ANY, ANY, ANY)
FARED = st.builds(
    Fared, st.floats(0, 100), st.sampled_from(["", "ttft", "tpot", "blocks", "worker"]), st.booleans(), st.booleans()
)
LOOKS = st.builds(
    Seen, ANY, ANY, st.lists(ARRIVALS, max_size=40).map(lambda all_: tuple(sorted(all_, key=lambda one: one.at))),
    st.lists(FARED, max_size=20).map(tuple), st.lists(STANDS, max_size=6).map(tuple),
    st.lists(st.tuples(st.sampled_from(["c", "d"]), st.just(table())), max_size=2).map(tuple), ANY,
    st.integers(1, 64), st.integers(1, 256), st.booleans(), st.booleans(),
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.lists(LOOKS, min_size=1, max_size=6), st.sampled_from([RULES, TOGETHER]))
def test_whatever_is_seen_a_plan_is_made_that_can_be_done(looks: list[Seen], rules: ControllerConfig) -> None:
    memory = Memory()
    for look in looks:
        decided, memory = plan(look, memory, rules)
        assert decided.reason
        if decided.flip is not None:
            _check(look.workers, decided.flip, rules)


def _check(workers: tuple[WorkerStand, ...], flip: Flip, rules: ControllerConfig) -> None:
    victim = next(one for one in workers if one.worker_id == flip.worker_id)
    others = [one for one in workers if one.cohort == victim.cohort and one is not victim]
    assert victim.role is not flip.to
    may_empty = rules.together and victim.role is Role.PREFILL
    assert any(one.role is victim.role for one in others) or (may_empty and others), "a pool would be empty"
    assert math.isfinite(flip.gain)
    assert math.isfinite(flip.cost)


LOADS = st.lists(
    st.tuples(st.floats(0.5, 12), st.integers(50, 9000), st.integers(1, 900), st.integers(5, 60)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=10, deadline=None)
@given(LOADS, st.integers(3, 8), st.sampled_from([RULES, TOGETHER]))
def test_workers_are_never_lost_and_without_a_change_of_load_they_come_to_rest(
    loads: list[tuple[float, int, int, int]], num_workers: int, rules: ControllerConfig
) -> None:
    """A cluster that does what is planned, under loads that change and then stay as they are."""
    workers, memory, now, begun = pools(1, num_workers - 1), Memory(), 0.0, 0.0
    arrivals: list[Arrived] = []
    flipped_at: list[float] = []
    for rate, num_prompt, num_output, seconds in [*loads, (*loads[-1][:3], 240)]:
        begun = now
        for _ in range(seconds):
            arrivals += steady(rate, now, now + 1.0, num_prompt=num_prompt, num_output=num_output) or ()
            arrivals = [one for one in arrivals if one.at >= now - 70]
            now += 1.0
            decided, memory = plan(seen(now, workers, arrivals), memory, rules)
            if decided.flip is not None:
                flip = decided.flip
                flipped_at.append(now)
                workers = [replace(one, role=flip.to) if one.worker_id == flip.worker_id else one for one in workers]
            assert len({one.worker_id for one in workers}) == num_workers
            roles = {one.role for one in workers}
            assert len(roles) == 2 or (rules.together and roles == {Role.DECODE})
    assert len([at for at in flipped_at if at > begun + 120]) <= 1, "it goes to and fro"
