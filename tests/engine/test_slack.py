"""An engine whose steps take what a formula says: what a step holds beside promises, which offers are refused."""

from __future__ import annotations

import math

import pytest

from engine.engine import Engine, EngineSpec
from engine.scheduler import SchedulerLimits
from engine.sequence import Sequence
from engine.slack import Slack
from engine.step_shape import StepRecord, StepShape
from engine.types import UNBOUNDED, Add, Key, Release, Request, Reserve, Sampled, SamplingParams, Service

TPOT_S = 0.010


def step_s(shape: StepShape) -> float:
    return 0.005 + 2e-4 * shape.num_decoding + 1e-4 * shape.num_chunk_tokens


class Bench:
    def __init__(self) -> None:
        limits = SchedulerLimits(4, 512, 32, 256)
        self.engine = Engine(EngineSpec(limits, 2000, 10_000, 1000, frozenset(), b"key"))
        self.shapes: list[StepShape] = []

    def add(self, name: str, num_prompt: int, max_tokens: int, tpot_s: float = math.inf) -> None:
        prompt = tuple((len(name) * 31 + 7 * index + ord(name[-1])) % 1000 for index in range(num_prompt))
        params = SamplingParams(max_tokens, ignore_eos=True)
        self.engine.handle(Add(Request(name, prompt, params, service=Service(tpot_s=tpot_s))))

    def steps(self, num: int) -> list[StepShape]:
        """What so many steps were."""
        for _ in range(num):
            batch = self.engine.begin()
            if batch is None:
                break
            shape = batch.shape
            self.engine.finish(batch, [Sampled((7,)) if item.samples else Sampled() for item in batch.scheduled])
            self.engine.learn(StepRecord(shape, step_s(shape)))
            self.shapes.append(shape)
        return self.shapes[-num:]

    def reserve(self, name: str, tpot_s: float) -> str | None:
        """The reason of a refusal."""
        self.engine.handle(Reserve(Key(name, 0), 8, 4, tpot_s=tpot_s))
        (reserved,) = self.engine.take_outputs().reserved
        return None if reserved.block_ids is not None else reserved.reason


def warm(num_streams: int, tpot_s: float) -> Bench:
    """So many streams, beside which prompts have been computed before."""
    bench = Bench()
    for index in range(num_streams):
        bench.add(f"s{index}", 4, 2000, tpot_s)
        bench.steps(20)
    bench.add("before", 2000, 1)
    bench.steps(200)
    return bench


def behind(num_tokens: int, late_s: float, slack: Slack) -> Sequence:
    """One that has generated so many tokens, and is so late by its schedule; negative: ahead of it."""
    service = Service(tpot_s=TPOT_S)
    sequence = Sequence.from_request(Request("r", (1,), SamplingParams(99), 0, (1,) * num_tokens, service=service))
    sequence.paced_from_s = slack.elapsed_s - late_s - TPOT_S * num_tokens
    return sequence


@pytest.mark.parametrize(
    ("late_s", "allowed_s"), [(0.0, 0.010), (0.002, 0.008), (1.0, 0.005), (-0.004, 0.014), (-1.0, 0.020)]
)
def test_who_is_ahead_lends_time_and_who_is_behind_gets_it_back(late_s: float, allowed_s: float) -> None:
    slack = Slack()
    slack.pass_time(5.0)
    assert slack.limit_s([behind(3, late_s, slack)]) == pytest.approx(allowed_s)
    assert slack.limit_s([behind(3, late_s, slack), behind(5, 1.0, slack)]) == pytest.approx(0.005), "the tightest"


def test_what_the_hand_off_took_counts() -> None:
    slack = Slack()
    request = Request("r", (1,), SamplingParams(99), 0, (1,), service=Service(tpot_s=TPOT_S))
    sequence = Sequence.from_request(request)
    sequence.waited_s = 0.003
    assert slack.limit_s([sequence]) == pytest.approx(0.007)


def test_steps_keep_the_pace_that_was_promised_and_prompts_go_on() -> None:
    bench = warm(4, TPOT_S)
    bench.add("prompt", 3000, 1)
    shapes = bench.steps(60)
    assert sum(map(step_s, shapes)) / len(shapes) <= TPOT_S * 1.05 + 0.010 / 60 * 10  # and what they were ahead by
    assert max(map(step_s, shapes)) <= 2 * TPOT_S
    assert sum(shape.num_chunk_tokens for shape in shapes) > 1000


def test_where_nothing_fits_every_eighth_step_takes_a_little() -> None:
    bench = warm(4, 0.001)
    bench.add("prompt", 3000, 1)
    assert {shape.num_chunk_tokens for shape in bench.steps(7)} <= {0, 16}
    assert sum(shape.num_chunk_tokens for shape in bench.steps(80)) == 10 * 16


def test_without_a_promise_chunks_are_whole() -> None:
    bench = warm(4, math.inf)
    bench.add("prompt", 600, 1)
    assert [shape.num_chunk_tokens for shape in bench.steps(4)] == [256, 256, 88, 0]
    assert bench.engine.stats().slack_tokens == UNBOUNDED


def test_an_offer_that_would_break_a_promise_is_refused_with_those_under_way() -> None:
    bench = warm(4, 0.0065)  # 5.8 ms now: room for three
    assert bench.reserve("plain", math.inf) is None
    assert bench.reserve("one", 1.0) is None
    assert bench.reserve("two", 1.0) is None
    reason = bench.reserve("three", 1.0)
    assert reason is not None and "0.0065 s were promised" in reason
    assert bench.reserve("plain too", math.inf) is None, "what was promised nothing is refused for lack of room only"
    bench.engine.handle(Release(Key("plain", 0)))
    bench.engine.handle(Release(Key("plain too", 0)))
    assert bench.reserve("three", 1.0) is None
