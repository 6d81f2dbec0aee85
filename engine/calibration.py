"""Calibration: some steps that an engine computes before its first command, so that its times are known from the start.

Each probe is a step of one shape: decoding sequences of some context, a prompt's chunk after some positions, or both.
What lies before is not computed but adopted, whatever bytes are there, so that long contexts cost no more than their
step. Probes go through the real model and pool, by engines that are thrown away: nothing is cached, counted or told,
and the blocks that were written are free. The measured steps go out with the first outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from engine.engine import Engine, EngineSpec, ModelRunner
from engine.step_shape import StepRecord
from engine.types import Add, Adopt, Request, Reserve, SamplingParams

NUM_DECODES = 2  # steps of a probe that only decodes; the last one counts, when its blocks have been touched before
SAMPLING = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


@dataclass(frozen=True, slots=True)
class Probe:
    """`num_decoding` sequences that store `context` positions each, and `num_new` of a prompt after `num_before`."""

    num_decoding: int = 0
    context: int = 1
    num_new: int = 0
    num_before: int = 0


def calibrate(
    spec: EngineSpec, model: ModelRunner, budget_s: float, clock: Callable[[], float]
) -> tuple[StepRecord, ...]:  # fmt: skip
    """Steps as they were measured, until all are or `budget_s` has passed, at the end of a step."""
    end, records = clock() + budget_s, list[StepRecord]()
    for probe in _probes(spec):
        if clock() >= end:
            break
        steps = _steps(_engine(spec, probe), model, clock)
        records += [*islice(steps, 1 if probe.num_new else NUM_DECODES)][-1:]
    return tuple(records)


def warm_up(spec: EngineSpec, model: ModelRunner, clock: Callable[[], float]) -> None:
    """Compute prompts of some lengths, so that what is compiled when it is first wanted is there."""
    chunk = spec.limits.prefill_chunk
    for probe in (Probe(num_new=chunk), Probe(num_new=max(1, chunk // 8), num_before=chunk), Probe(4, 64, num_new=2)):
        if _fits(spec, probe):
            next(_steps(_engine(spec, probe), model, clock), None)


def _probes(spec: EngineSpec) -> Iterator[Probe]:
    """What says most comes first, after what touches most blocks. Those that do not fit are left out."""
    chunk, num_seats = spec.limits.prefill_chunk, spec.limits.max_batch_seqs
    wanted = (
        Probe(1, 4 * chunk),
        Probe(num_new=chunk // 8),
        Probe(8, 64),
        Probe(num_new=chunk // 8, num_before=4 * chunk),
        Probe(1, 16),
        Probe(num_new=chunk // 2),
        Probe(num_seats // 4, chunk),
        Probe(4, 64, num_new=chunk // 4),
        Probe(num_new=chunk),
        Probe(num_seats // 2, 16),
        Probe(num_new=chunk, num_before=2 * chunk),
    )
    return (probe for probe in wanted if _fits(spec, probe))


def _fits(spec: EngineSpec, probe: Probe) -> bool:
    """Windowed layers cannot be adopted in the middle of a prompt."""
    limits, size = spec.limits, spec.limits.block_size
    lengths = [probe.context + SAMPLING.max_tokens] * probe.num_decoding
    lengths += [probe.num_before + probe.num_new + SAMPLING.max_tokens] * bool(probe.num_new)
    num_blocks = len(limits.groups) * sum(-(-length // size) for length in lengths)
    is_windowed = any(group.window is not None for group in limits.groups)
    return (
        0 < len(lengths) <= limits.max_batch_seqs
        and probe.num_decoding + probe.num_new <= limits.max_batch_tokens
        and max(lengths) < spec.max_context
        and num_blocks <= spec.num_blocks
        and not (is_windowed and probe.num_before)
    )


def _engine(spec: EngineSpec, probe: Probe) -> Engine:
    """With these sequences."""
    engine = Engine(replace(spec, limits=replace(spec.limits, prefix_cache=False, lookahead=0)))
    for index in range(probe.num_decoding):
        request = replace(_request(spec, f"decode-{index}", probe.context), generated_ids=(0,))
        _adopt(engine, request, probe.context, probe.context)
    if probe.num_new:
        request = _request(spec, "prompt", probe.num_before + probe.num_new)
        if probe.num_before:
            _adopt(engine, request, request.num_tokens, probe.num_before)
        else:
            engine.handle(Add(request))
    return engine


def _adopt(engine: Engine, request: Request, num_reserved: int, computed: int) -> None:
    engine.handle(Reserve(request.key, num_reserved))
    engine.handle(Adopt(request, computed))


def _request(spec: EngineSpec, name: str, num_tokens: int) -> Request:
    return Request(name, tuple(index % spec.vocab_size for index in range(num_tokens)), SAMPLING)


def _steps(engine: Engine, model: ModelRunner, clock: Callable[[], float]) -> Iterator[StepRecord]:
    while (batch := engine.begin()) is not None:
        begun, shape = clock(), batch.shape
        engine.finish(batch, model.execute(batch))
        yield StepRecord(shape, clock() - begun)
