"""How many workers there should be: when some come, when one leaves, and when neither."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.control.planner import Memory, Plan, plan
from cluster.control.rules import ControllerConfig, ScaleConfig
from cluster.control.scale import Resize
from cluster.control.seen import Seen
from engine.types import Role
from router.arrivals import Arrived
from router.report import WorkerStand
from tests.cluster.control.cases import pools, refused, seen, steady, worker

MIXED = {"num_prompt": 4000, "num_output": 200.0, "ttft_s": 3.0, "tpot_s": 0.03}  # a prompt takes 0.4 s


def rules(fewest: int = 2, most: int = 12, **scale: object) -> ControllerConfig:
    scale = {"add_after_s": 5.0, "remove_after_s": 20.0} | scale
    bounds = ScaleConfig.model_validate({"min_workers": fewest, "max_workers": most, **scale})
    return ControllerConfig(confirmations=3, together=False, scale=bounds)


def at(rate: float, workers: Sequence[WorkerStand], **fields: object) -> Seen:
    """A minute of arrivals."""
    return seen(100.0, workers, steady(rate, 35.0, 100.0, **MIXED), **fields)


def play(look: Seen, ticks: int, by: ControllerConfig) -> list[Plan]:
    """The same again, a second later each time."""
    plans, memory = [], Memory()
    for tick in range(ticks):
        moved = tuple(replace(one, at=one.at + tick) for one in look.arrived)
        now = look.now + tick
        decided, memory = plan(replace(look, now=now, reported_at=now, arrived=moved), memory, by)
        plans.append(decided)
    return plans


def resizes(plans: Sequence[Plan]) -> list[tuple[int, Resize]]:
    return [(tick, one.resize) for tick, one in enumerate(plans) if one.resize is not None]


def test_where_no_split_is_enough_more_come_at_once_but_not_soon() -> None:
    (tick, first), *_ = resizes(play(at(12.0, pools(2, 2)), 8, rules()))
    assert tick == 5
    assert len(first.add) >= 2, "so many as the demand takes"
    assert set(first.add) <= set(Role)
    assert "resize: " in play(at(12.0, pools(2, 2)), 6, rules())[-1].reason


def test_a_flip_comes_before_a_worker() -> None:
    """One prefill and five decode workers are short of prefill, but not of workers."""
    prompts = steady(2.0, 35.0, 100.0, num_prompt=14_000, num_output=10.0, ttft_s=3.0)
    plans = play(seen(100.0, pools(1, 5), prompts), 12, rules())
    assert [one.flip.to for one in plans if one.flip is not None][:1] == [Role.PREFILL]
    assert not resizes(plans)


def test_no_more_come_than_are_allowed_and_those_on_their_way_count() -> None:
    assert len(resizes(play(at(30.0, pools(2, 2)), 8, rules(most=6)))[0][1].add) == 2
    assert not resizes(play(at(30.0, pools(2, 2), coming=("decode-7", "decode-8")), 30, rules(most=6)))


def test_no_worker_comes_for_what_workers_cannot_mend() -> None:
    """Each prompt alone takes longer than its target."""
    hopeless = seen(100.0, pools(2, 2), steady(2.0, 35.0, 100.0, num_prompt=9000, ttft_s=0.5, num_output=10.0))
    assert not [one for _, one in resizes(play(hopeless, 30, rules())) if one.add]


def test_nobody_leaves_where_nearly_nothing_is_attained() -> None:
    """Prompts take longer than their target however many workers there are."""
    hopeless = seen(100.0, pools(2, 3), steady(5.0, 35.0, 100.0, num_prompt=9000, ttft_s=0.5, num_output=10.0))
    assert not resizes(play(hopeless, 60, rules(most=5)))


def test_one_too_many_leaves_late_and_one_at_a_time() -> None:
    found = resizes(play(at(1.0, pools(3, 5)), 50, rules()))
    assert [tick for tick, _ in found] == [20, 41]
    assert {one.add for _, one in found} == {()}


def test_who_leaves_is_who_has_least_to_move() -> None:
    workers = [replace(one, queued_s=1.0 + int(one.worker_id[1]), num_tokens=900.0) for one in pools(4, 1)]
    (_, one), *_ = resizes(play(at(1.0, workers), 25, rules()))
    assert (one.remove, one.incarnation) == ("w0", "w0.1")


def test_one_that_has_not_come_yet_is_let_go_first() -> None:
    (_, one), *_ = resizes(play(at(1.0, pools(3, 5), coming=("decode-9",), new=("decode-9",)), 25, rules()))
    assert (one.remove, one.incarnation) == ("decode-9", "")


def test_without_any_requests_one_after_the_other_leaves_down_to_the_fewest() -> None:
    found = resizes(play(seen(100.0, pools(2, 2), ()), 85, rules(fewest=3)))
    assert [tick for tick, _ in found] == [80], "not before it has looked for a window"
    assert not resizes(play(seen(100.0, pools(2, 1), ()), 160, rules(fewest=3)))


def test_what_gateways_do_not_say_is_not_taken_for_no_requests() -> None:
    silent = seen(100.0, pools(3, 3), (), tables=())
    assert not resizes(play(silent, 160, rules()))


@pytest.mark.parametrize("bounds", [{}, {"min_workers": 4, "max_workers": 4}])
def test_where_the_number_is_fixed_nobody_comes_or_leaves(bounds: dict[str, int]) -> None:
    fixed = ControllerConfig(together=False, scale=ScaleConfig.model_validate(bounds | {"add_after_s": 0.0}))
    assert not resizes(play(at(30.0, pools(2, 2)), 10, fixed))


def test_what_is_absurd_begins_the_wait_anew() -> None:
    look, memory, by = at(12.0, pools(2, 2)), Memory(), rules()
    for tick in range(9):
        now = 100.0 + tick
        moved = tuple(replace(one, at=one.at + tick) for one in look.arrived)
        reported_at = 0.0 if tick == 4 else now
        decided, memory = plan(replace(look, now=now, reported_at=reported_at, arrived=moved), memory, by)
        assert decided.resize is None


# --- whatever the load is -------------------------------------------------------------------------------------

LOADS = st.lists(
    st.tuples(st.floats(0, 25), st.integers(50, 9000), st.integers(1, 900), st.integers(5, 90)), min_size=1, max_size=4
)


@settings(max_examples=15, deadline=None)
@given(LOADS, st.integers(2, 4), st.integers(4, 9), st.booleans())
def test_the_bounds_hold_and_without_a_change_of_load_the_number_comes_to_rest(
    loads: list[tuple[float, int, int, int]], fewest: int, most: int, dies: bool
) -> None:
    """A cluster that does what is planned; those that come take eight seconds."""
    by = rules(fewest, most, add_after_s=3.0, remove_after_s=6.0)
    workers, memory, now, begun = pools(1, 3), Memory(), 0.0, 0.0
    coming: dict[str, tuple[float, Role]] = {}
    arrivals: list[Arrived] = []
    resized_at: list[float] = []
    for rate, num_prompt, num_output, seconds in [*loads, (*loads[-1][:3], 240)]:
        begun = now
        for _ in range(seconds):
            arrivals += steady(rate, now, now + 1.0, num_prompt=num_prompt, num_output=num_output) if rate else ()
            arrivals = [one for one in arrivals if one.at >= now - 70]
            now += 1.0
            for name, (due, role) in list(coming.items()):
                if due <= now:
                    del coming[name]
                    workers = [*workers, worker(name, role)]
            if dies and now == 30.0:
                coming[workers[0].worker_id], workers = (now + 20.0, workers[0].role), workers[1:]
            fared = refused(now - 0.5, "ttft", 3) if now % 50 == 0 else ()
            decided, memory = plan(seen(now, workers, arrivals, fared=fared, coming=tuple(coming)), memory, by)
            if decided.flip is not None:
                flip = decided.flip
                assert decided.resize is None
                workers = [replace(one, role=flip.to) if one.worker_id == flip.worker_id else one for one in workers]
            if decided.resize is not None:
                resized_at.append(now)
                coming |= {f"n{now}-{index}": (now + 8.0, role) for index, role in enumerate(decided.resize.add)}
                coming.pop(decided.resize.remove, None)
                workers = [one for one in workers if one.worker_id != decided.resize.remove]
            assert fewest <= len(workers) + len(coming) <= max(most, 4)
            assert dies or {one.role for one in workers} == set(Role)
    assert len([at for at in resized_at if at > begun + 150]) <= 1, "it goes to and fro"
