from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from prefill_worker.stored import NOTHING, Stored, newly_stored

ALL_SLOTS = 5
Records = set[tuple[int, int]]  # (block, slot)


def records(stored: Stored) -> Records:
    return {(block, slot) for block in range(60) for slot in range(stored.slots_of(block, ALL_SLOTS))}


@st.composite
def histories(draw: st.DrawFn) -> list[Stored]:
    """What a prompt's steps tell: of each step some layers, in order, then all."""
    told, num_blocks = list[Stored](), 0
    for step in draw(st.lists(st.integers(0, 9), min_size=1, max_size=6)):
        for num_slots in draw(st.lists(st.integers(0, ALL_SLOTS), max_size=4).map(sorted)):
            told.append(Stored(num_blocks, num_blocks + step, num_slots))
        num_blocks += step
        told.append(Stored.whole(num_blocks))
    return told


@given(histories(), st.lists(st.booleans(), min_size=1))
def test_each_record_is_new_once_however_often_one_looks(told: list[Stored], looks: list[bool]) -> None:
    seen, cut = Records(), NOTHING
    for number, now in enumerate(told):
        if not looks[number % len(looks)] and now is not told[-1]:
            continue
        areas = newly_stored(cut, now, ALL_SLOTS)
        new = [(block, slot) for blocks, slots in areas for block in blocks for slot in slots]
        assert len(new) == len({*new})
        assert not seen.intersection(new)
        seen.update(new)
        assert seen == records(now)
        cut = now
    assert seen == {(block, slot) for block in range(told[-1].num_whole) for slot in range(ALL_SLOTS)}


def test_a_step_that_is_told_less_of_than_before_takes_nothing_back() -> None:
    assert [*newly_stored(Stored(2, 6, 3), Stored(2, 6, 2), ALL_SLOTS)] == []
    assert [*newly_stored(Stored.whole(6), Stored(2, 6, 2), ALL_SLOTS)] == []
