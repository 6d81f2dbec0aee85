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


@given(PROMPTS, st.integers(1, 300), st.integers(1, 600), st.floats(0, 5))
def test_it_is_what_step_after_step_gives(prompts: list[Prompt], chunk: int, budget: int, now: float) -> None:
    ends, left_at = [0.0] * len(prompts), [one.num_left for one in prompts]
    left, time = dict(enumerate(left_at)), 0.0
    while left:
        begins = max(time, min(prompts[number].placed for number in left))
        taken = _taken(prompts, left, begins, chunk, budget)
        time = begins + sum(prompts[number].compute_s * count / prompts[number].num_tokens for number, count in taken)
        for number, count in taken:
            left[number] -= count
            ends[number] = time
            if (begins + time) / 2 <= now:
                left_at[number] = max(1, left_at[number] - count)
        left = {number: count for number, count in left.items() if count}
    assert rehearse(prompts, 0.0, chunk, budget) == ends
    assert [one.num_left for one in progressed(prompts, 0.0, now, chunk, budget)] == left_at
