from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.simulator.known_times import KnownTimes
from cluster.simulator.network import LinkTimes
from cluster.simulator.service_times.roofline import Roofline
from engine.types import EngineStats, Role
from router.policies import POLICIES, PolicyName
from router.policies.occupancy import Decode, Decodes, Prompts, decodes_of, prompts_of
from router.policies.rehearsal import Prompt
from router.policies.snapshot import Ask, Decision, EngineLimits, Memory, Placement, Refuse, Snapshot, Wait, WorkerLoad
from tests.router.fake_workers import member

LIMITS = EngineLimits(block_size=16, prefill_chunk=1000, max_batch_tokens=2000, max_batch_seqs=8)
STEPS = Roofline(0.0, 0.0, 0.0, prefill_token_s=1e-3, decode_sequence_s=0.01)  # 10 ms per sequence in a step
TIMES = KnownTimes(lambda _role: STEPS, LinkTimes(0.0, 1e12))


def load(
    name: str, prompt_tokens: int = 0, sequences: int = 0, connected: bool = True, cohort: str = "c",
    prompts: Prompts | None = None, decodes: Decodes | None = None, **stats: int,
) -> WorkerLoad:  # fmt: skip
    stats = {"num_blocks": 1000, "num_free_blocks": 1000} | stats
    return WorkerLoad(
        member(name, cohort=cohort), connected, sequences, prompt_tokens, EngineStats(**stats), prompts or Prompts(),
        decodes or Decodes(),
    )  # fmt: skip


def queue(*prompts: tuple[int, float], since: float = 0.0) -> Prompts:
    """Of (tokens, due) that came before."""
    made = [Prompt(due, since, tokens, tokens * 1e-3, tokens) for tokens, due in prompts]
    return prompts_of(made, since, LIMITS.prefill_chunk, LIMITS.max_batch_tokens)


def running(*ends: float, tokens: float = 100.0, tpot_s: float = math.inf) -> Decodes:
    return decodes_of(Decode(end, tokens, tpot_s) for end in ends)


def ask(
    num_tokens: int = 100, num_output: int = 10, ttft_s: float = math.inf, tpot_s: float = math.inf, priority: int = 0,
    **fields: object,
) -> Ask:  # fmt: skip
    return Ask(num_tokens, num_output, float(num_output), ttft_s, tpot_s, priority, **fields)  # type: ignore[arg-type]


def decide(policy: PolicyName, loads: list[WorkerLoad], asked: Ask | None = None, **fields: object) -> Decision | None:
    return POLICIES[policy](Snapshot(0.0, loads, asked or ask(), TIMES, LIMITS, **fields))  # type: ignore[arg-type]


def choose(
    loads: list[WorkerLoad], hand_off: bool = True, policy: PolicyName = "least_load", turn: int = 0
) -> Placement | None:
    decision = decide(policy, loads, ask(hand_off=hand_off), memory=Memory(turn))
    assert decision is None or isinstance(decision, Placement)
    return decision


def names(placement: Decision | None) -> tuple[str, str | None] | None:
    if placement is None:
        return None
    assert isinstance(placement, Placement), placement
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


@pytest.mark.parametrize("policy", POLICIES)
@given(LOADS, st.randoms(use_true_random=False))
def test_any_loads_give_a_sound_placement_whatever_their_order(
    policy: PolicyName, loads: list[WorkerLoad], order
) -> None:
    """The request has no targets, so nobody refuses it."""
    placement = choose(loads, policy=policy)
    shuffled = list(loads)
    order.shuffle(shuffled)
    assert choose(shuffled, policy=policy) == placement
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
    if placement.decode is not None:
        assert (placement.first, placement.decode) in pairs
    elif pairs and policy != "colocated":
        assert placement.first.role is Role.DECODE, "who does it all where there are pairs is out of the way of prompts"


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


# --- the others' ----------------------------------------------------------------------------------------------


def test_prefix_aware_goes_where_the_prefix_is_unless_many_are_there() -> None:
    cached = ask(cached={("p1", "i1"): 80})
    assert names(decide("prefix_aware", [load("p0"), load("p1", sequences=2), load("d0")], cached)) == ("p1", "d0")
    loads = [load("p0"), load("p1", sequences=9), load("p2"), load("p3"), load("d0")]
    assert names(decide("prefix_aware", loads, cached)) == ("p0", "d0")


def test_distserve_counts_prompts_and_not_their_lengths() -> None:
    loads = [load("p0", 4000, prompts=queue((4000, 9.0))), load("p1", 2, prompts=queue((1, 9.0), (1, 9.0))), load("d0")]
    assert names(decide("distserve", loads)) == ("p0", "d0")
    assert names(decide("least_load", loads)) == ("p1", "d0")


def test_mooncake_weighs_the_queue_against_the_prefix_and_moves_one_that_is_much_longer() -> None:
    cached = ask(400, cached={("p1", "i1"): 300})
    loads = [load("p0"), load("p1", prompts=queue((200, 9.0))), load("d0")]
    assert names(decide("mooncake", loads, cached)) == ("p0", "d0"), "p1 takes 0.2 + 0.1 s, p0 0.1 s with p1's prefix"
    short = ask(400, cached={("p0", "i1"): 200, ("p1", "i1"): 300})
    loads = [load("p0"), load("p1", prompts=queue((50, 9.0))), load("d0")]
    assert names(decide("mooncake", loads, short)) == ("p1", "d0"), "0.05 + 0.1 s; p0 keeps its own, 0.2 s"


def test_mooncake_refuses_by_the_load_of_now_even_if_it_is_gone_when_the_request_gets_there() -> None:
    loads = [load("p0"), load("d0", decodes=running(0.01, 0.01, 0.01))]
    asked = ask(100, ttft_s=1.0, tpot_s=0.035)
    assert decide("mooncake", loads, asked) == Refuse("tpot", 1.0)
    assert names(decide("slo", loads, asked)) == ("p0", "d0")
    assert decide("mooncake", loads, ask(1001, ttft_s=1.0)) == Refuse("ttft", 1.0)


def test_windserve_sends_a_prompt_to_decode_once_prefill_is_late_and_decode_has_the_slots() -> None:
    asked = ask(20, ttft_s=0.1, tpot_s=0.05)
    busy = load("p0", prompts=queue((80, 9.0)))
    assert names(decide("windserve", [load("p0", prompts=queue((60, 9.0))), load("d0")], asked)) == ("p0", "d0")
    assert names(decide("windserve", [busy, load("d0")], asked)) == ("d0", None)
    assert names(decide("windserve", [busy, load("d0", decodes=running(9.0, 9.0, 9.0, 9.0))], asked)) == ("p0", "d0")
    assert names(decide("windserve", [busy, load("d0", num_free_blocks=1)], asked)) == ("p0", "d0")


def test_dopd_computes_ultra_short_ones_where_they_decode_and_gathers_the_other_short_ones() -> None:
    loads = [load("p0", 900), load("p1", 10), load("d0")]
    memory = Memory(3, mean_prompt=800.0, short_batch=("p0", "i1"))
    assert names(decide("dopd_buckets", loads, ask(511), memory=memory)) == ("d0", None)
    assert names(decide("dopd_buckets", loads, ask(700), memory=memory)) == ("p0", "d0"), "the batch holds 2000"
    assert names(decide("dopd_buckets", loads, ask(900), memory=memory)) == ("p1", "d0"), "a long one goes alone"
    full = [load("p0", 1900), load("p1", 10), load("d0")]
    assert names(decide("dopd_buckets", full, ask(700), memory=memory)) == ("p1", "d0")


def test_llmd_looks_at_the_cache_of_the_decode_worker_and_at_no_load() -> None:
    loads = [load("p0"), load("d0"), load("d1", sequences=1)]
    assert names(decide("llmd_threshold", loads, ask(600))) == ("p0", "d0")
    assert names(decide("llmd_threshold", loads, ask(500))) == ("d0", None)
    assert names(decide("llmd_threshold", [load("p0"), load("d0")], ask(600, cached={("d0", "i1"): 128}))) == (
        "d0",
        None,
    )


# --- ours -----------------------------------------------------------------------------------------------------


def test_colocated_takes_any_worker_for_all_of_it_and_the_one_with_the_fewest_sequences() -> None:
    loads = [load("p0", sequences=3), load("p1", 900, sequences=1), load("d0", sequences=2)]
    assert names(choose(loads, policy="colocated")) == ("p1", None)
    assert names(choose([*loads, load("d1")], policy="colocated")) == ("d1", None)


def test_slo_takes_the_prefill_worker_with_the_first_token_soonest_cache_included() -> None:
    loads = [load("p0", prompts=queue((500, 9.0))), load("p1", prompts=queue((600, 9.0))), load("d0")]
    assert names(decide("slo", loads)) == ("p0", "d0")
    assert names(decide("slo", loads, ask(400, cached={("p1", "i1"): 390}))) == ("p1", "d0"), "0.6 + 0.01 < 0.5 + 0.4 s"


def test_slo_leaves_a_queue_alone_in_which_somebody_would_be_late() -> None:
    """The one before it is in the same step, and gets its first token with the new one, after 1.1 s."""
    tight, asked = load("p0", prompts=queue((900, 1.0))), ask(200, ttft_s=2.0)
    loads = [tight, load("p1", prompts=queue((1500, 9.0))), load("d0")]
    assert names(decide("slo", loads, asked)) == ("p1", "d0")
    assert isinstance(decide("slo", [tight, load("d0")], asked), Refuse)


def test_slo_packs_decode_with_a_target_and_spreads_without() -> None:
    loads = [load("p0"), load("d0"), load("d1", decodes=running(9.0))]
    assert names(decide("slo", loads, ask(100, ttft_s=1.0, tpot_s=0.035))) == ("p0", "d1")
    assert names(decide("slo", loads, ask(100, ttft_s=1.0))) == ("p0", "d0")


def test_slo_keeps_the_target_of_everybody_on_the_decode_worker() -> None:
    """A step with three takes 30 ms."""
    strict = load("d1", decodes=running(9.0, 9.0, tpot_s=0.025))
    loads = [load("p0"), load("d0"), strict]
    assert names(decide("slo", loads, ask(100, ttft_s=1.0, tpot_s=0.05))) == ("p0", "d0")


def test_slo_computes_a_prompt_on_a_decode_worker_with_slack_where_that_is_sooner() -> None:
    busy = load("p0", prompts=queue((500, 9.0)))
    asked = ask(20, ttft_s=1.0, tpot_s=0.05)
    assert names(decide("slo", [busy, load("d0")], asked)) == ("d0", None)
    full = load("d0", decodes=running(9.0, 9.0, 9.0, 9.0, tpot_s=0.05))
    assert names(decide("slo", [busy, full], asked)) == ("p0", "d0")
    assert names(decide("slo", [load("p0"), load("d0")], asked)) == ("p0", "d0"), "it is no sooner there"


def test_slo_computes_a_longer_prompt_there_in_chunks_one_after_the_other() -> None:
    """35 tokens a step beside the one that decodes: 100 tokens take 2.9 steps of 45 ms."""
    busy, decoding = load("p0", prompts=queue((500, 9.0))), running(9.0, tpot_s=0.05)
    asked = ask(100, ttft_s=1.0, tpot_s=0.05)
    decision = decide("slo", [busy, load("d0", decodes=decoding)], asked)
    assert names(decision) == ("d0", None)
    assert isinstance(decision, Placement) and decision.ttft_s == pytest.approx(0.01 + 100 / 35 * 0.045, rel=0.05)
    with_prompt = load("d0", decodes=decoding, prompts=queue((20, 9.0)))
    assert names(decide("slo", [busy, with_prompt], asked)) == ("p0", "d0")


def test_slo_waits_for_those_who_end_in_time_and_else_refuses_until_then() -> None:
    full = running(0.5, 9.0, tpot_s=0.025)
    loads = [load("p0"), load("d0", decodes=full)]
    assert isinstance(decide("slo", loads, ask(100, ttft_s=0.6, tpot_s=0.05)), Wait)
    decision = decide("slo", loads, ask(100, ttft_s=0.2, tpot_s=0.05))
    assert isinstance(decision, Refuse) and decision.reason == "tpot"
    assert 0.2 < decision.retry_after_s <= 0.5


def test_slo_looks_ahead_who_ends_meanwhile_is_no_load() -> None:
    ending = running(0.05, 0.05, 0.05, tpot_s=0.05)
    assert names(decide("slo", [load("p0"), load("d0", decodes=ending)], ask(100, ttft_s=1.0, tpot_s=0.02))) == (
        "p0",
        "d0",
    )


def test_slo_asks_for_blocks_for_the_prompt_and_its_growth_and_half_of_the_others() -> None:
    loads = [load("p0"), load("d0", decodes=running(9.0, tokens=1000.0), num_blocks=100)]
    assert names(decide("slo", loads, ask(400, 100))) == ("p0", "d0")
    assert decide("slo", loads, ask(400, 200)) == Wait("blocks")


def test_slo_gives_more_answers_than_a_worker_has_seats_to_one_that_is_empty() -> None:
    most = LIMITS.max_batch_seqs + 1
    assert names(decide("slo", [load("p0"), load("d0")], ask(num_answers=most))) == ("p0", "d0")
    assert isinstance(decide("slo", [load("p0"), load("d0", decodes=running(5.0))], ask(num_answers=most)), Wait)


def test_slo_lets_best_effort_wait_while_requests_with_targets_come_and_prompts_are_there() -> None:
    busy, idle = load("p0", prompts=queue((100, 9.0))), load("p1")
    batch = ask(100, priority=10)
    assert decide("slo", [busy, load("d0")], batch, promised_of_late=True) == Wait("yields")
    assert names(decide("slo", [busy, load("d0")], batch)) == ("p0", "d0"), "to nobody nobody yields"
    assert names(decide("slo", [busy, idle, load("d0")], batch, promised_of_late=True)) == ("p1", "d0")


def test_slo_lets_who_has_no_target_wait_where_others_would_be_late() -> None:
    assert decide("slo", [load("p0", prompts=queue((900, 1.0))), load("d0")], ask(200)) == Wait("yields")


def test_slo_refuses_a_target_that_no_load_could_keep() -> None:
    decision = decide("slo", [load("p0"), load("d0")], ask(2000, ttft_s=0.5))
    assert isinstance(decision, Refuse) and decision.retry_after_s == 60.0
    decision = decide("slo", [load("p0"), load("d0")], ask(100, ttft_s=0.5, tpot_s=0.001))
    assert isinstance(decision, Refuse) and decision.retry_after_s == 60.0


def test_slo_refuses_until_the_queue_is_so_much_shorter() -> None:
    loads = [load("p0", prompts=queue((1000, 1.0), (1000, 1.0), (1000, 1.0))), load("d0")]
    decision = decide("slo", loads, ask(100, ttft_s=1.0))
    assert isinstance(decision, Refuse) and decision.reason == "ttft"
    assert 1.9 < decision.retry_after_s < 2.5


# --- without a prefill worker: both phases on every worker ------------------------------------------------------


def test_slo_alone_with_decode_workers_goes_where_the_first_token_is_soonest() -> None:
    """10 ms a step beside one that has 50 ms: 35 tokens fit, and 100 take 2.9 steps of 45 ms after the one under way:
    sooner than behind a prompt of 100 ms, and later than on the idle one or where all is cached."""
    busy = load("d0", decodes=running(9.0, tpot_s=0.05))
    queued = load("d1", prompts=queue((100, 1.0)))
    idle = load("d2")
    assert names(decide("slo", [busy, queued], ask(ttft_s=2.0, tpot_s=0.05))) == ("d0", None)
    assert names(decide("slo", [busy, queued, idle], ask(ttft_s=2.0, tpot_s=0.05))) == ("d2", None)
    cached = {queued.name: 90}
    assert names(decide("slo", [queued, busy], ask(ttft_s=2.0, tpot_s=0.05, cached=cached))) == ("d1", None)


def test_slo_alone_with_decode_workers_refuses_what_would_be_late_or_make_others_late() -> None:
    asked = ask(num_tokens=500, ttft_s=0.4, tpot_s=0.05)
    assert decide("slo", [load("d0")], asked) == Refuse("ttft", 60.0)  # half a second by itself
    late = decide("slo", [load("d0", prompts=queue((900, 1.0)))], replace(asked, ttft_s=1.0))
    assert isinstance(late, Refuse) and late.reason == "ttft"
    before = load("d0", prompts=queue((400, 0.45)))  # would be late behind one that is due before it
    unkind = decide("slo", [before], replace(asked, num_tokens=300, ttft_s=0.4))
    assert isinstance(unkind, Refuse)


def test_slo_alone_with_decode_workers_that_have_no_slack_waits_or_says_when_one_ends() -> None:
    full = load("d0", decodes=running(3.0, 4.0, 5.0, tpot_s=0.03))  # their steps take 30 ms
    assert decide("slo", [full], ask(ttft_s=2.0, tpot_s=0.05)) == Refuse("ttft", 3.0)
    assert decide("slo", [full], ask()) == Wait("ttft")


def test_slo_alone_with_decode_workers_without_room_tells_what_is_lacking() -> None:
    """d0 could compute the prompt and has no seat then; d1 has room for one more and no time for a prompt."""
    full = load("d0", decodes=running(*[9.0] * 8, tpot_s=1.0))
    slow = load("d1", decodes=running(9.0, 9.0, 9.0, tpot_s=0.04))
    decision = decide("slo", [full, slow], ask(ttft_s=2.0, tpot_s=0.05))
    assert isinstance(decision, Wait | Refuse)
    assert decision.reason in ("seats", "ttft")
