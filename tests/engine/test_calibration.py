"""What an engine measures before its first command: useful, in time, and without a trace."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from engine.calibration import calibrate
from engine.engine import EngineSpec
from engine.layer_groups import LayersStored
from engine.planes import Group
from engine.scheduler import Batch, SchedulerLimits
from engine.step_shape import StepShape
from engine.types import Sampled
from tests.engine.tiny import random_prompt, random_weights, request, run, tiny_config, tiny_engine

LIMITS = SchedulerLimits(16, max_batch_tokens=512, max_batch_seqs=64, prefill_chunk=256)
SPEC = EngineSpec(LIMITS, 2048, 8192, 100, frozenset(), b"key")


@dataclass
class Clock:
    """A model runner whose steps take a tenth of a second, and the clock that they move."""

    now: float = 0.0
    shapes: list[StepShape] = field(default_factory=list)

    def execute(self, batch: Batch, stored: LayersStored | None = None) -> list[Sampled]:
        self.now += 0.1
        self.shapes.append(batch.shape)
        return [Sampled((1,)) if item.samples else Sampled() for item in batch.scheduled]

    def __call__(self) -> float:
        return self.now


def test_it_sees_prompts_and_decodes_of_different_sizes_each_as_it_was_computed() -> None:
    clock = Clock()
    records = calibrate(SPEC, clock, 100.0, clock)
    assert all(record.step_s == pytest.approx(0.1) and record.shape in clock.shapes for record in records)
    alone = {record.shape.chunks[0].num_new for record in records if record.shape.chunks}
    assert len(alone) >= 3 and max(alone) == LIMITS.prefill_chunk
    assert {record.shape.chunks[0].num_before for record in records if record.shape.chunks} >= {0, 512, 1024}
    assert {record.shape.num_decoding for record in records} >= {0, 1, 4, 8, 16}
    assert any(record.shape.num_context > 1000 for record in records if record.shape.num_decoding == 1)


@pytest.mark.parametrize("budget_s", [0.0, 0.05, 0.45])
def test_it_ends_with_the_step_in_which_its_time_is_up(budget_s: float) -> None:
    clock = Clock()
    records = calibrate(SPEC, clock, budget_s, clock)
    assert clock.now <= budget_s + 0.2 and len(records) <= len(clock.shapes)
    assert bool(records) == (budget_s > 0)


@pytest.mark.parametrize(
    "spec",
    [
        replace(SPEC, num_blocks=4),
        replace(SPEC, max_context=8),
        replace(SPEC, limits=replace(LIMITS, prefill_chunk=1, max_batch_tokens=1, max_batch_seqs=1)),
        replace(SPEC, limits=replace(LIMITS, groups=(Group((0,)), Group((1,), window=32)))),
    ],
    ids=["few blocks", "short context", "one token", "windows"],
)
def test_what_does_not_fit_is_left_out(spec: EngineSpec) -> None:
    clock = Clock()
    calibrate(spec, clock, 100.0, clock)
    for shape in clock.shapes:
        assert shape.num_chunk_tokens + shape.num_decoding <= spec.limits.max_batch_tokens


def test_a_real_model_computes_the_same_afterwards_and_holds_nothing() -> None:
    config = tiny_config()
    weights, prompt = random_weights(config, 1), random_prompt(config, 40, 2)
    plain, measured = (tiny_engine(config, weights) for _ in range(2))
    clock = Clock()
    assert calibrate(measured.engine.spec, measured.runner, 100.0, clock)
    after, alone = (run(one.engine, one.runner, [request("r", prompt)]) for one in (measured, plain))
    assert after == alone
    assert measured.engine.stats() == plain.engine.stats()
