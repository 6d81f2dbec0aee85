"""Synthesis: a described part becomes a workload."""

from __future__ import annotations

from pathlib import Path

from cluster.simulator.chance import Chance
from cluster.simulator.workloads.arrivals import GammaGaps, Gaps, PoissonGaps, WeibullGaps, arrival_times
from cluster.simulator.workloads.lengths import Independent, LengthPairs, lengths_of
from cluster.simulator.workloads.parts import (
    GammaPart,
    Part,
    RampPart,
    SessionsPart,
    SinePart,
    SquarePart,
    StepPart,
    SyntheticPart,
    TracePart,
    VaryingPart,
    WeibullPart,
)
from cluster.simulator.workloads.rates import Ramp, Rate, Sine, Square, Steady
from cluster.simulator.workloads.sessions import SessionPlan, sessions
from cluster.simulator.workloads.shape import cap_lengths, cut, scale_lengths, shift, speed_up
from cluster.simulator.workloads.spread import spread
from cluster.simulator.workloads.traces import read_trace
from cluster.simulator.workloads.workload import Arrival, Workload
from engine.errors import ConfigError

MAX_EXPECTED = 5_000_000  # requests of one part, so that a slip of the pen doesn't fill the memory


def synthesise(part: Part, name: str, folder: Path, chance: Chance) -> Workload:
    """`folder`: where relative paths begin. Raises ConfigError for a bad trace."""
    workload = _requests(part, name, folder, chance)
    workload = scale_lengths(workload, part.prompt_scale, part.output_scale)
    workload = cap_lengths(workload, part.max_prompt, part.max_output)
    workload = cut(speed_up(workload, part.speedup), part.max_s, part.requests)
    return shift(workload, part.start_s)


def _requests(part: Part, name: str, folder: Path, chance: Chance) -> Workload:
    if isinstance(part, TracePart):
        return spread(read_trace(folder / part.path), part.spread, chance)
    assert isinstance(part, SyntheticPart | SessionsPart)
    rate = _rate_of(part)
    if (expected := rate.expected_by(part.seconds)) > MAX_EXPECTED:
        raise ConfigError(f"{name}: {expected:g} arrivals are expected; at most {MAX_EXPECTED:,} are possible")
    if isinstance(part, SessionsPart):
        return sessions(name, _plan_of(part), part.seconds, chance)
    return _independent(part, name, rate, _pairs_of(part, folder), chance)


def _independent(part: SyntheticPart, name: str, rate: Rate, pairs: LengthPairs, chance: Chance) -> Workload:
    lengths = chance.fork("lengths")
    times = arrival_times(rate, _gaps_of(part), part.seconds, chance.fork("times"))
    return Workload(name, tuple(Arrival(at_s, *pairs.draw(at_s / part.seconds, lengths)) for at_s in times))


def _rate_of(part: SyntheticPart | SessionsPart) -> Rate:
    match part:
        case StepPart():
            return Ramp(part.rate, part.to_rate, part.at_s, part.at_s)
        case RampPart():
            return Ramp(part.rate, part.to_rate, part.begin_s, part.end_s)
        case SinePart():
            return Sine(part.rate, part.amplitude, part.period_s)
        case SquarePart():
            return Square(part.rate, part.to_rate, part.period_s, part.duty)
        case _:
            return Steady(part.rate)


def _gaps_of(part: SyntheticPart) -> Gaps:
    match part:
        case WeibullPart():
            return WeibullGaps(part.shape)
        case GammaPart() | VaryingPart() if part.cv != 1:
            return GammaGaps(part.cv)
        case _:
            return PoissonGaps()


def _pairs_of(part: SyntheticPart, folder: Path) -> LengthPairs:
    if part.lengths is not None:
        return lengths_of(read_trace(folder / part.lengths))
    return Independent(part.prompt, part.output)


def _plan_of(part: SessionsPart) -> SessionPlan:
    return SessionPlan(
        part.rate, part.turns, part.system, part.prompt, part.output, part.think_s, part.ttft_s, part.tpot_s,
        part.max_prompt,
    )  # fmt: skip
