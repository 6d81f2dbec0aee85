"""A rehearsal counts equal steps together: it says what a rehearsal of step after step says."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.policies.rehearsal import Prompt, _taken, progressed, rehearse

PROMPTS = st.lists(
    st.builds(
        lambda placed, num_tokens, compute_s, num_done: Prompt(
            9.0, placed, num_tokens, compute_s, max(1, num_tokens - num_done)
        ),
        st.sampled_from((0.0, 0.4, 3.0)), st.integers(1, 2000), st.floats(0.01, 2), st.sampled_from((0, 0, 100, 1900)),
    ),
    min_size=1,
    max_size=5,
)  # fmt: skip


@given(PROMPTS, st.integers(1, 300), st.integers(1, 600))
def test_it_is_what_step_after_step_gives(prompts: list[Prompt], chunk: int, budget: int) -> None:
    ends = [0.0] * len(prompts)
    left, time = {number: one.num_left for number, one in enumerate(prompts)}, 0.0
    while left:
        begins = max(time, min(prompts[number].placed for number in left))
        taken = _taken(prompts, left, begins, chunk, budget)
        time = begins + sum(prompts[number].compute_s * count / prompts[number].num_tokens for number, count in taken)
        for number, count in taken:
            left[number] -= count
            ends[number] = time
        left = {number: count for number, count in left.items() if count}
    assert rehearse(prompts, 0.0, chunk, budget) == ends


@given(PROMPTS, st.floats(-1, 5), st.integers(1, 300))
def test_work_is_neither_lost_nor_made(prompts: list[Prompt], work_s: float, chunk: int) -> None:
    after = progressed(prompts, work_s, chunk)
    assert all(1 <= now.num_left <= before.num_left for now, before in zip(after, prompts, strict=True))
    done_s = sum(before.left_s - now.left_s for now, before in zip(after, prompts, strict=True))
    token_s = max(one.compute_s / one.num_tokens for one in prompts)
    if any(one.num_left > 1 for one in after):  # else there was not so much to do
        assert abs(done_s - max(0.0, work_s)) <= token_s
    assert done_s <= max(0.0, work_s) + token_s


def test_what_is_longer_than_a_chunk_is_computed_beside_others_first() -> None:
    short, long = Prompt(1.0, 0.0, 100, 0.1, 100), Prompt(2.0, 0.0, 1000, 1.0, 1000)
    assert [one.num_left for one in progressed([short, long], 0.25, 256)] == [100, 750]
    begun = Prompt(3.0, 0.0, 1000, 1.0, 600)
    assert [one.num_left for one in progressed([short, long, begun], 0.25, 256)] == [100, 1000, 350]
