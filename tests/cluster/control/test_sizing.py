"""Sizing: predicted attainment over splits, against closed forms and against brute force."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.control.demand import Demand, Kind, demand_of
from cluster.control.sizing import Bias, Machine, best, decode_share, prefill_share, splits
from tests.cluster.control.cases import SEQUENCE_S, STEP_S, arrived, pools, seen, steady, table

MACHINE = Machine(table(), 4096 * 16.0, 128)


def demand(rate: float, num_prompt: int = 1000, num_output: float = 100, **targets: float) -> Demand:
    one = arrived(0.0, num_prompt, num_output)
    limits = {"ttft_s": 1.0, "tpot_s": 0.03} | targets
    return Demand(rate, 1.0, (Kind(1.0, one.num_prompt, one.num_output, one.compute_s, **limits),))


@pytest.mark.parametrize("busy", [0.5, 0.8, 0.95, 1.2, 2.0])
@pytest.mark.parametrize("patience", [0.5, 2.0, 8.0])
def test_so_many_are_lost_as_in_a_queue_that_refuses_who_would_be_late(busy: float, patience: float) -> None:
    """M/M/1 played: who finds more work than it has patience for, does not join. Times in mean services."""
    chance = np.random.default_rng(1)
    count = 40_000
    gaps, services = chance.exponential(1 / busy, count), chance.exponential(1.0, count)
    work, lost = 0.0, 0
    for gap, service in zip(gaps, services, strict=True):
        work = max(0.0, work - gap)
        if work > patience:
            lost += 1
        else:
            work += service
    shares = np.full(2000, 1 / 2000)
    lengths = -np.log(1 - (np.arange(2000) + 0.5) / 2000)
    kinds = tuple(Kind(share, 1, 1, s, s + patience, math.inf) for share, s in zip(shares, lengths, strict=True))
    kept = prefill_share(Demand(busy, 1.0, kinds), np.array([1.0]))
    assert 1 - kept[0] == pytest.approx(lost / count, abs=0.02)


@pytest.mark.parametrize("num_workers", [2, 4, 8])
@pytest.mark.parametrize("busy", [0.7, 0.95, 1.3])
def test_a_pool_of_several_loses_about_as_many_as_one_played(num_workers: int, busy: float) -> None:
    chance = np.random.default_rng(2)
    count, patience = 30_000, 1.0
    gaps, services = chance.exponential(1 / (busy * num_workers), count), chance.exponential(1.0, count)
    free_at, now, lost = [0.0] * num_workers, 0.0, 0
    for gap, service in zip(gaps, services, strict=True):
        now += gap
        first = min(range(num_workers), key=free_at.__getitem__)
        if free_at[first] - now > patience:
            lost += 1
        else:
            free_at[first] = max(now, free_at[first]) + service
    shares = np.full(2000, 1 / 2000)
    lengths = -np.log(1 - (np.arange(2000) + 0.5) / 2000)
    kinds = tuple(Kind(share, 1, 1, s, s + patience, math.inf) for share, s in zip(shares, lengths, strict=True))
    kept = prefill_share(Demand(busy * num_workers, 1.0, kinds), np.array([float(num_workers)]))
    assert 1 - kept[0] == pytest.approx(lost / count, abs=0.05)


def test_more_prompts_than_a_pool_can_compute_are_not_taken() -> None:
    kept = prefill_share(demand(rate=40), np.array([1.0, 2.0, 8.0]))  # 0.1 s each: 4 workers' worth
    assert kept == pytest.approx([1 / 4, 1 / 2, 1.0], abs=0.01)
    patient = prefill_share(demand(rate=40, ttft_s=math.inf), np.array([1.0, 4.0, 8.0]))
    assert patient == pytest.approx([1 / 4, 1.0, 1.0], abs=0.01)


def test_who_cannot_have_a_first_token_in_time_takes_nothing_from_others() -> None:
    both = replace(demand(rate=15), kinds=(
        replace(demand(1).kinds[0], share=0.5), replace(demand(1, num_prompt=20_000).kinds[0], share=0.5),
    ))  # fmt: skip
    assert prefill_share(both, np.array([1.0]))[0] == pytest.approx(0.5, abs=0.02)


def test_decode_is_bounded_by_the_step_that_a_target_allows() -> None:
    """At a target of 20 ms there are (0.97 x 20 - 10) / 0.2 = 47 sequences at most; each takes 100 steps of 19.4 ms."""
    most = (0.97 * 0.02 - STEP_S) / SEQUENCE_S
    rate = most / (100 * 0.97 * 0.02)
    one = np.array([1.0])
    share = [float(decode_share(demand(part * rate, tpot_s=0.02), MACHINE, one, one)[0]) for part in (0.5, 2.0)]
    assert share[0] > 0.999
    assert share[1] == pytest.approx(0.5, abs=0.05)


def test_decode_is_bounded_by_blocks() -> None:
    few = replace(MACHINE, kv_tokens=10 * 1050 / 0.9)  # ten sequences
    one = np.array([1.0])
    rate = 10 / (100 * (STEP_S + 10 * SEQUENCE_S))
    assert decode_share(demand(2 * rate, tpot_s=1.0), few, one, one)[0] == pytest.approx(0.5, abs=0.05)
    assert decode_share(demand(2 * rate, tpot_s=1.0), MACHINE, one, one)[0] > 0.99


def test_the_link_is_a_bound_of_its_own() -> None:
    slow = replace(MACHINE, transfer_token_s=1e-3)  # a second for a prompt
    one = np.array([1.0])
    assert decode_share(demand(1.2, tpot_s=1.0), slow, one, one)[0] == pytest.approx(0.5, abs=0.01)


def test_a_target_that_no_step_keeps_is_kept_by_nobody() -> None:
    one = np.array([1.0])
    assert decode_share(demand(1.0, tpot_s=0.005), MACHINE, one, one)[0] == 0.0


@pytest.mark.parametrize(("num_prompt", "num_output", "wanted"), [(8000, 10, 6), (200, 600, 1), (2000, 150, None)])
def test_long_prompts_want_prefill_workers_and_long_answers_decode_workers(
    num_prompt: int, num_output: float, wanted: int | None
) -> None:
    rate = {8000: 7.0, 200: 30.0}.get(num_prompt, 5.0)
    found = splits(demand(rate, num_prompt, num_output, ttft_s=3.0), MACHINE, 8)
    chosen = best(found, 4)
    assert len(found) == 7
    if wanted is not None:
        assert abs(chosen.num_prefill - wanted) <= 1
    assert chosen.attained == pytest.approx(max(split.attained for split in found), abs=1e-3)


def test_of_equal_splits_the_nearest_is_best() -> None:
    found = splits(demand(0.5), MACHINE, 8)
    assert all(split.attained > 0.99 for split in found[1:-1])
    for now in range(2, 7):
        assert best(found, now).num_prefill == now


DEMANDS = st.builds(
    demand, st.floats(0.01, 1e4), st.integers(1, 200_000), st.floats(1, 1e5), ttft_s=st.floats(1e-3, 1e4),
    tpot_s=st.floats(1e-4, 1e3),
)  # fmt: skip


@given(DEMANDS, st.integers(2, 64), st.floats(0.5, 2), st.floats(0.5, 2), st.floats(0, 1e-2))
def test_whatever_comes_a_share_is_a_share_and_less_load_is_never_worse(
    asked: Demand, num_workers: int, prefill: float, decode: float, transfer_token_s: float
) -> None:
    machine = replace(MACHINE, transfer_token_s=transfer_token_s)
    found = splits(asked, machine, num_workers, Bias(prefill, decode))
    half = splits(replace(asked, rate=asked.rate / 2), machine, num_workers, Bias(prefill, decode))
    assert [split.num_prefill + split.num_decode for split in found] == [num_workers] * (num_workers - 1)
    for split, easier in zip(found, half, strict=True):
        assert 0 <= split.attained <= 1
        assert 0 <= split.prefill <= 1
        assert 0 <= split.decode <= 1
        assert easier.prefill >= split.prefill - 1e-9


def test_nothing_to_do_is_kept_by_any_split() -> None:
    idle = Demand(0.0, 1.0, demand(1.0).kinds)
    assert all(split.attained == 1.0 for split in splits(idle, MACHINE, 4))
    assert splits(idle, MACHINE, 1) == []


def test_demand_knows_the_distribution_and_not_only_the_mean() -> None:
    arrivals = [arrived(index * 0.1, 100 if index % 10 else 10_000) for index in range(200)]
    found = demand_of(arrivals, 10.0)
    assert found is not None
    assert found.rate == 10.0
    assert sum(kind.share for kind in found.kinds) == pytest.approx(1.0)
    assert max(kind.num_prompt for kind in found.kinds) == 10_000
    assert found.compute_s == pytest.approx(sum(one.compute_s for one in arrivals) / 200)


def test_arrivals_in_clumps_are_bursty_and_even_ones_are_not() -> None:
    clumps = [arrived(10 * (index // 20) + 0.001 * (index % 20)) for index in range(200)]
    bursty = seen(100.0, pools(1, 1), clumps).demand(100.0)
    even = seen(100.0, pools(1, 1), steady(2.0, 0.0, 100.0)).demand(100.0)
    assert bursty is not None
    assert even is not None
    assert (bursty.rate, even.rate) == (2.0, 2.0)
    assert bursty.burstiness > 5
    assert even.burstiness == 1.0


def test_no_arrivals_are_no_demand() -> None:
    assert demand_of([], 0.0) is None
