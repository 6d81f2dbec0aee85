"""Sessions: talks of several turns, each of which repeats all that was said before.

1. sessions begin at random; the tokens of one are a single stream, cut into pieces that it alone names, after a system
   prompt whose pieces all sessions share;
2. a turn's prompt is that stream up to the end of its question, so it begins with all earlier prompts and answers;
3. the next turn comes when the answer is expected to have come, and the user has thought. It doesn't wait for the
   real answer: the load stays the same whatever serves it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cluster.simulator.chance import Chance
from cluster.simulator.workloads.arrivals import PoissonGaps, arrival_times
from cluster.simulator.workloads.lengths import Lengths
from cluster.simulator.workloads.rates import Steady
from cluster.simulator.workloads.workload import Arrival, Workload

PIECE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class SessionPlan:
    """`rate`: sessions that begin per second. An answer is expected after ttft_s + tpot_s for each of its tokens."""

    rate: float
    num_turns: Lengths
    num_system: int  # tokens all prompts begin with, whole pieces
    num_question: Lengths
    num_answer: Lengths
    think_s: float  # mean of an exponential
    ttft_s: float
    tpot_s: float
    max_prompt: int  # a session ends before its prompt would be longer


@dataclass(frozen=True, slots=True)
class _Turn:
    at_s: float
    num_prompt: int
    num_output: int


def sessions(name: str, plan: SessionPlan, span_s: float, chance: Chance) -> Workload:
    """Sessions that begin within `span_s`; their later turns may come after it."""
    assert plan.num_system % PIECE_TOKENS == 0, "a piece is shared as a whole"
    arrivals: list[Arrival] = []
    system = range(plan.num_system // PIECE_TOKENS)
    next_piece = len(system)
    begins = arrival_times(Steady(plan.rate), PoissonGaps(), span_s, chance.fork("begins"))
    for number, begin_s in enumerate(begins):
        num_own = 0
        for turn in _turns(plan, begin_s, begin_s / span_s, chance.fork(f"session {number}")):
            num_own = -(-turn.num_prompt // PIECE_TOKENS) - len(system)
            pieces = (*system, *range(next_piece, next_piece + num_own))
            arrivals.append(Arrival(turn.at_s, turn.num_prompt, turn.num_output, pieces))
        next_piece += num_own
    return Workload(name, tuple(sorted(arrivals, key=lambda arrival: arrival.at_s)), PIECE_TOKENS)


def _turns(plan: SessionPlan, at_s: float, progress: float, chance: Chance) -> Iterator[_Turn]:
    num_said = plan.num_system
    for _ in range(plan.num_turns.draw(progress, chance)):
        num_prompt = num_said + plan.num_question.draw(progress, chance)
        num_output = plan.num_answer.draw(progress, chance)
        if num_prompt > plan.max_prompt:
            return
        yield _Turn(at_s, num_prompt, num_output)
        num_said = num_prompt + num_output
        at_s += plan.ttft_s + plan.tpot_s * num_output + chance.exponential(plan.think_s)
