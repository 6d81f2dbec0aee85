"""Workloads made of others keep what they should: order, numbers, and which prompts begin alike."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.simulator.chance import Chance
from cluster.simulator.workloads.prompts import prompt_of
from cluster.simulator.workloads.shape import cap_lengths, cut, mix, scale_lengths, shift, speed_up
from cluster.simulator.workloads.spread import Spread, rounded_to_s, spread
from cluster.simulator.workloads.workload import Arrival, Workload

VOCAB_SIZE = 32000  # so that the first token of a piece tells it from all others here


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    piece_tokens = draw(st.sampled_from((8, 12, 64)))

    def arrival(at_s: float, num_prompt: int, num_output: int, root: int) -> Arrival:
        """Names 0 to 2 begin a prompt; those after belong to it and to the length, so that they are shared, too."""
        num_pieces = -(-num_prompt // piece_tokens)
        pieces = tuple(root + 3 * index for index in range(num_pieces)) if root < 3 else ()
        return Arrival(at_s, num_prompt, num_output, pieces)

    times = sorted(draw(st.lists(st.floats(0, 100), max_size=5)))
    lengths = st.integers(1, 200)
    arrivals = [arrival(at_s, draw(lengths), draw(lengths), draw(st.integers(0, 3))) for at_s in times]
    return Workload("w", tuple(arrivals), piece_tokens)


def prompts(workload: Workload) -> list[tuple[int, ...]]:
    return [prompt_of(workload, number, VOCAB_SIZE) for number in range(len(workload.arrivals))]


def check(workload: Workload) -> None:
    """By time, and every prompt can be made."""
    at = [arrival.at_s for arrival in workload.arrivals]
    assert at == sorted(at)
    lengths = [arrival.num_prompt for arrival in workload.arrivals]
    assert [len(prompt) for prompt in prompts(workload)] == lengths
    assert all(length >= 1 for length in lengths)


def num_shared(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    return next(
        (at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


@given(workloads(), st.floats(0.1, 10), st.floats(0, 50))
def test_speed_and_start_change_times_only(workload: Workload, factor: float, by_s: float) -> None:
    changed = shift(speed_up(workload, factor), by_s)
    check(changed)
    assert prompts(changed) == prompts(workload)
    for arrival, before in zip(changed.arrivals, workload.arrivals, strict=True):
        assert abs(arrival.at_s - (before.at_s / factor + by_s)) < 1e-9


@given(workloads(), st.floats(0, 100), st.integers(0, 10))
def test_a_cut_is_a_beginning(workload: Workload, max_s: float, max_requests: int) -> None:
    kept = cut(workload, max_s, max_requests).arrivals
    assert kept == workload.arrivals[: len(kept)]
    assert len(kept) == min(max_requests, sum(arrival.at_s < max_s for arrival in workload.arrivals))
    assert cut(workload) == workload


@given(workloads(), st.integers(1, 100), st.integers(1, 100))
def test_a_capped_prompt_is_the_beginning_of_what_it_was(workload: Workload, max_prompt: int, max_output: int) -> None:
    capped = cap_lengths(workload, max_prompt, max_output)
    check(capped)
    assert [prompt[:max_prompt] for prompt in prompts(workload)] == prompts(capped)
    assert [min(a.num_output, max_output) for a in workload.arrivals] == [a.num_output for a in capped.arrivals]


@given(workloads(), st.floats(0.05, 4), st.floats(0.05, 4))
def test_scaled_prompts_share_as_much_of_their_pieces_as_before(
    workload: Workload, prompt: float, output: float
) -> None:
    scaled = scale_lengths(workload, prompt, output)
    check(scaled)
    for arrival, before in zip(scaled.arrivals, workload.arrivals, strict=True):
        assert arrival.num_prompt == max(1, round(before.num_prompt * prompt))
        assert arrival.num_output == max(1, round(before.num_output * output))
        assert arrival.pieces == before.pieces[: len(arrival.pieces)]


@settings(max_examples=60)
@given(st.lists(workloads(), min_size=1, max_size=3))
def test_a_mix_has_all_requests_by_time_and_keeps_prompts_of_two_parts_apart(parts: list[Workload]) -> None:
    """Outputs are as long as the part's number, to tell whose a request is."""
    marked = [
        replace(part, arrivals=tuple(replace(arrival, num_output=index) for arrival in part.arrivals))
        for index, part in enumerate(parts)
    ]
    mixed = mix("m", marked)
    check(mixed)
    owners = [arrival.num_output for arrival in mixed.arrivals]
    made = list(zip(owners, prompts(mixed), strict=True))
    for index, part in enumerate(parts):
        ours = [prompt for owner, prompt in made if owner == index]
        before = prompts(part)
        assert len(ours) == len(before)
        for (one, one_before), (two, two_before) in combinations(zip(ours, before, strict=True), 2):
            assert num_shared(one, two) == num_shared(one_before, two_before)
    for (owner, one), (other, two) in combinations(made, 2):
        assert owner == other or num_shared(one, two) == 0


@given(st.lists(st.integers(0, 20), min_size=1, max_size=30), st.sampled_from(Spread), st.integers(0, 5))
def test_rounded_times_are_spread_inside_their_window(ticks: list[int], how: Spread, seed: int) -> None:
    """Each batch stays before the next, and nothing is moved by a window or more."""
    workload = Workload("w", tuple(Arrival(3.0 * tick, index + 1, 1) for index, tick in enumerate(sorted(ticks))))
    done = spread(workload, how, Chance(seed))
    check(done)
    assert [arrival.num_prompt for arrival in done.arrivals] == list(range(1, len(ticks) + 1))
    window_s = rounded_to_s(workload)
    moved = [after.at_s - before.at_s for after, before in zip(done.arrivals, workload.arrivals, strict=True)]
    if how is Spread.NONE or not window_s:
        assert not any(moved)
    else:
        assert all(0 <= by < window_s for by in moved)


def test_times_that_are_not_rounded_stay() -> None:
    workload = Workload("w", tuple(Arrival(at_s, 1, 1) for at_s in (0.0, 0.0, 0.04, 2.0)))
    assert spread(workload, Spread.JITTER, Chance(1)) is workload


def test_even_spacing_is_even() -> None:
    workload = Workload("w", tuple(Arrival(at_s, 1, 1) for at_s in (0.0, 0.0, 0.0, 3.0, 6.0, 6.0)))
    assert [arrival.at_s for arrival in spread(workload, Spread.EVEN, Chance(1)).arrivals] == [0, 1, 2, 3, 6, 7.5]
