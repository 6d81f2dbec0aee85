from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from engine.types import EngineStats, Role
from router.policy import Placement, WorkerLoad, choose
from tests.router.fake_workers import member


def load(
    name: str, prompt_tokens: int = 0, sequences: int = 0, connected: bool = True, cohort: str = "c",
    **stats: int,
) -> WorkerLoad:  # fmt: skip
    return WorkerLoad(member(name, cohort=cohort), connected, sequences, prompt_tokens, EngineStats(**stats))


def names(placement: Placement | None) -> tuple[str, str | None] | None:
    if placement is None:
        return None
    return placement.first.worker_id, placement.decode.worker_id if placement.decode else None


LOADS = st.lists(
    st.builds(
        lambda role, index, tokens, sequences, connected, cohort, waiting: load(
            f"{role}{index}", tokens, sequences, connected, cohort, num_waiting_tokens=waiting
        ),
        st.sampled_from("pd"), st.integers(0, 9), st.integers(0, 50), st.integers(0, 5), st.booleans(),
        st.sampled_from("xy"), st.integers(0, 50),
    ),
    unique_by=lambda each: each.member.worker_id,
    max_size=6,
)  # fmt: skip


def test_without_a_hand_off_one_worker_does_it_all_and_a_decode_worker_if_there_is_one() -> None:
    assert names(choose([load("p0"), load("d0", sequences=2), load("d1", sequences=1)], hand_off=False)) == ("d1", None)
    assert names(choose([load("p0", 10), load("p1", 5)], hand_off=False)) == ("p1", None)


def test_the_prefill_worker_with_the_fewest_prompt_tokens_and_the_decode_worker_with_the_fewest_sequences() -> None:
    loads = [load("p0", 10), load("p1", 5), load("d0", sequences=2), load("d1", sequences=1)]
    assert names(choose(loads)) == ("p1", "d1")


def test_in_turn_each_pool_goes_round_by_itself_whatever_its_workers_have_to_do() -> None:
    loads = [load("p10", 99), load("p2"), load("d0", sequences=9), load("d1"), load("d2", connected=False)]
    turns = [names(choose(loads, policy="round_robin", turn=turn)) for turn in range(4)]
    assert turns == [("p2", "d0"), ("p10", "d1"), ("p2", "d0"), ("p10", "d1")]
    loads.append(load("d3"))
    turns = [names(choose(loads, policy="round_robin", turn=turn)) for turn in range(4)]
    assert turns == [("p2", "d0"), ("p10", "d1"), ("p2", "d3"), ("p10", "d0")]


def test_what_a_worker_reports_counts_if_it_is_more_than_what_we_sent_there() -> None:
    loads = [
        load("p0", 1, num_waiting_tokens=100), load("p1", 50),
        load("d0", num_running=3, num_waiting=1), load("d1", sequences=3),
    ]  # fmt: skip
    assert names(choose(loads)) == ("p1", "d1")


def test_equally_many_sequences_are_told_apart_by_blocks_in_use_then_by_name() -> None:
    loads = [
        load("p1"),
        load("p0"),
        load("d0", num_blocks=10, num_free_blocks=3),
        load("d1", num_blocks=10, num_free_blocks=4),
    ]
    assert names(choose(loads)) == ("p0", "d1")


def test_a_pool_that_is_gone_leaves_the_other_to_serve_alone() -> None:
    assert names(choose([load("p0", 3), load("p1", 2), load("d0", connected=False)])) == ("p1", None)
    assert names(choose([load("p0", connected=False), load("d0", sequences=2), load("d1", sequences=1)])) == (
        "d1",
        None,
    )


def test_unequal_cohorts_are_never_paired() -> None:
    loads = [load("p0", cohort="x"), load("p1", 100, cohort="y"), load("d0", cohort="y")]
    assert names(choose(loads)) == ("p1", "d0")
    assert names(choose([load("p0", cohort="x"), load("d0", cohort="y")])) == ("p0", None)


def test_nobody_to_be_reached_is_no_placement() -> None:
    assert choose([]) is None
    assert choose([load("p0", connected=False), load("d0", connected=False)]) is None


@given(LOADS, st.randoms(use_true_random=False))
def test_any_loads_give_a_sound_placement_whatever_their_order(loads: list[WorkerLoad], order) -> None:
    placement = choose(loads)
    shuffled = list(loads)
    order.shuffle(shuffled)
    assert choose(shuffled) == placement
    connected = [each.member for each in loads if each.connected]
    assert (placement is None) == (not connected)
    if placement is None:
        return
    assert placement.first in connected
    pairs = [
        (p, d)
        for p in connected
        for d in connected
        if (p.role, d.role) == (Role.PREFILL, Role.DECODE) and p.cohort == d.cohort
    ]
    assert (placement.decode is not None) == bool(pairs)
    if placement.decode is not None:
        assert (placement.first, placement.decode) in pairs


@given(LOADS)
def test_more_work_elsewhere_never_changes_the_choice(loads: list[WorkerLoad]) -> None:
    placement = choose(loads)
    if placement is None:
        return
    chosen = [placement.first, placement.decode]
    busier = [
        each if each.member in chosen else replace(each, num_prompt_tokens=200, num_sequences=200) for each in loads
    ]
    assert choose(busier) == placement
