"""Rankings by arrays are what a look at one worker after the other gives."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.simulator.known_times import KnownTimes
from cluster.simulator.network import LinkTimes
from cluster.simulator.service_times.roofline import Roofline
from engine.types import EngineStats, Role
from router.policies.fleet import Fleet
from router.policies.occupancy import Decode, decodes_of, prompts_of
from router.policies.rankings import Option, by_fullness, quickest, slackest
from router.policies.rehearsal import Prompt
from router.policies.room import Crowd, crowd_on, lacks
from router.policies.snapshot import Ask, Snapshot, WorkerLoad
from tests.router.fake_workers import member
from tests.router.test_policies import LIMITS, TIMES

NOW, MOST = 10.0, 3
AT_ONCE = KnownTimes(lambda _role: Roofline(0.0, 0.0, 0.0, prefill_token_s=0.0), LinkTimes(0.0, 1e12))  # all are equal
COHORTS = ("c", "other")
NAMES = tuple(f"{role}{number}" for number in (0, 2, 1, 3, 10) for role in "pd")
TIMES_S = st.sampled_from((9.0, 10.0, 10.5, 11.0, 12.5, 40.0))  # few, so that there are ties
PROMPTS = st.lists(
    st.builds(lambda due, num: Prompt(due, 9.5, num, num * 1e-3, num), TIMES_S, st.integers(1, 2000)), max_size=4
)
DECODES = st.lists(
    st.builds(Decode, TIMES_S, st.sampled_from((50.0, 400.5, 6000.0)), st.sampled_from((0.02, math.inf))), max_size=9
)
STATS = st.builds(EngineStats, num_running=st.integers(0, 9), num_blocks=st.integers(1, 120))


@st.composite
def loads(draw: st.DrawFn) -> list[WorkerLoad]:
    found = draw(st.lists(st.sampled_from(NAMES), unique=True))
    return [
        WorkerLoad(
            member(name, cohort=draw(st.sampled_from(COHORTS))), draw(st.integers(0, 9)) > 0, 0, 0, draw(STATS),
            prompts_of(draw(PROMPTS), 9.5, LIMITS.prefill_chunk, LIMITS.max_batch_tokens), decodes_of(draw(DECODES)),
        )
        for name in found
    ]  # fmt: skip


ASKS = st.builds(
    Ask, num_tokens=st.sampled_from((1, 300, 2500)), num_output=st.sampled_from((1, 200)),
    expected_output=st.just(50.0), ttft_s=st.sampled_from((0.2, 1.0, 2.5, math.inf)), num_answers=st.integers(1, 3),
    cached=st.dictionaries(st.sampled_from([(name, "i1") for name in NAMES]), st.sampled_from((16, 288, 4000))),
    refused_by=st.none() | st.sampled_from([(name, "i1") for name in NAMES]),
)  # fmt: skip


def pool(snapshot: Snapshot, role: Role, cohort: str) -> list[WorkerLoad]:
    return [load for load in snapshot.pool(role) if load.member.cohort == cohort]


def one_by_one(snapshot: Snapshot, cohort: str) -> list[Option]:
    options: list[Option] = []
    for load in pool(snapshot, Role.PREFILL, cohort):
        own_s = snapshot.prefill_s(load)
        before_s, spare_s = load.prompts.around_s(NOW + snapshot.ask.ttft_s, NOW)
        options.append(Option(own_s <= spare_s, before_s + own_s, own_s, snapshot.cached_on(load), load))
    return sorted(options, key=lambda one: one.rank)


def crowd_by_crowd(snapshot: Snapshot, cohort: str, at: float, fullest_first: bool) -> list[tuple[str, Crowd]]:
    mates = pool(snapshot, Role.DECODE, cohort)
    sign = -1 if fullest_first else 1
    ranked = sorted(
        (load.name == snapshot.ask.refused_by, sign * crowd[0], sign * crowd[1], load.member.worker_id, crowd)
        for load in mates
        for crowd in [crowd_on(snapshot, load, at)]
        if not lacks(snapshot, crowd[0], crowd[1], load.stats.num_blocks)
    )
    return [(worker_id, crowd) for *_, worker_id, crowd in ranked]


@settings(max_examples=200, deadline=None)
@given(loads(), ASKS, st.sampled_from(COHORTS), st.sampled_from((TIMES, AT_ONCE)))
def test_the_quickest_are_the_first_of_all_that_are_ranked(
    known: list[WorkerLoad], ask: Ask, cohort: str, times: KnownTimes
) -> None:
    snapshot = Snapshot(NOW, known, ask, times, LIMITS)
    assert quickest(snapshot, Fleet(known), cohort, MOST) == one_by_one(snapshot, cohort)[:MOST]


@settings(max_examples=200, deadline=None)
@given(loads(), ASKS, st.sampled_from(COHORTS), TIMES_S, st.booleans())
def test_the_fullest_are_those_that_have_room_one_by_one(
    known: list[WorkerLoad], ask: Ask, cohort: str, at: float, fullest_first: bool
) -> None:
    snapshot = Snapshot(NOW, known, ask, TIMES, LIMITS)
    found = by_fullness(snapshot, Fleet(known), cohort, at, fullest_first)
    named = [(known[place].member.worker_id, crowd) for place, crowd in found]
    assert named == crowd_by_crowd(snapshot, cohort, at, fullest_first)


@settings(max_examples=200, deadline=None)
@given(loads(), ASKS)
def test_the_slackest_have_no_prompt_and_the_fewest_sequences_or_the_most_of_it_cached(
    known: list[WorkerLoad], ask: Ask
) -> None:
    snapshot = Snapshot(NOW, known, ask, TIMES, LIMITS)
    idle = [load for load in snapshot.pool(Role.DECODE) if not load.prompts.all]
    fewest = sorted(idle, key=lambda load: (len(load.decodes.ends), load.decodes.tokens[0], load.name))[:MOST]
    found = [known[place] for place in slackest(snapshot, Fleet(known), MOST)]
    assert found[: len(fewest)] == fewest
    most_cached = max([snapshot.cached_on(load) for load in idle], default=0)
    assert max([snapshot.cached_on(load) for load in found], default=0) == most_cached
    assert len(found) <= len(fewest) + 1
