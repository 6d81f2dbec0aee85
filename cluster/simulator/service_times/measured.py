"""Service times from measured steps: the fitted roofline, drawn to the measurements where there are some.

1. the roofline is fitted to all steps;
2. for each kind of step (decode alone, chunks alone, both) the ratio of measured to fitted durations is kept by size:
   of decode by sequences and mean context, of the others by the chunks' tokens;
3. a ratio inside of a row is the median of itself and its two neighbours: what one measurement alone says is noise;
4. a step takes what the roofline says, times the ratio between the nearest measured ones; beyond them the last ratio
   holds. Where nothing of the kind was measured, the roofline alone counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from statistics import median

from cluster.simulator.service_times.fit import Fitted, fit_roofline, medians_of
from cluster.simulator.service_times.model import contexts_of
from cluster.simulator.service_times.rows import Point, Rows, lines_of
from engine.step_shape import StepRecord, StepShape

SIZE_STEP = 1.1  # sizes within such a ratio share one ratio, the median: single measurements are noisy


class MeasuredTimes:
    """Implements service_times.model.ServiceTimes."""

    def __init__(self, records: Sequence[StepRecord]) -> None:
        self.fitted: Fitted = fit_roofline(records)
        self._roofline = self.fitted.times
        medians = medians_of(records)
        ratios = [(shape, seconds / self._roofline.step_s(shape)) for shape, seconds in medians.items()]
        decode = [(shape, ratio) for shape, ratio in ratios if not shape.chunks]
        self._decode = _rows((shape.num_decoding, _size(_mean(shape)), ratio) for shape, ratio in decode)
        self._chunks = [
            _rows(
                (0.0, _size(shape.num_chunk_tokens), ratio)
                for shape, ratio in ratios
                if shape.chunks and bool(shape.num_decoding) == beside_decode
            )
            for beside_decode in (False, True)
        ]
        self._range = _Range(medians)

    def step_s(self, shape: StepShape) -> float:
        if not shape.chunks:
            return self._decode_s(shape.num_decoding, shape.num_context)
        fitted_s = self._roofline.step_s(shape)
        rows = self._chunks[bool(shape.num_decoding)]
        return fitted_s * rows.at(0.0, shape.num_chunk_tokens) if rows else fitted_s

    def decode_steps_s(self, num_decoding: int, num_context: int, num_steps: int) -> list[float]:
        return [self._decode_s(num_decoding, context) for context in contexts_of(num_decoding, num_context, num_steps)]

    def extrapolates(self, shape: StepShape) -> bool:
        return not self._range.has(shape)

    def _decode_s(self, num_decoding: int, num_context: int) -> float:
        fitted_s = self._roofline.decode_s(num_decoding, num_context)
        if self._decode is None:
            return fitted_s
        return fitted_s * self._decode.at(num_decoding, num_context / num_decoding)


class _Range:
    """From the least to the most that was measured: of decoding sequences and their mean context, and of chunks' tokens
    and how far into its prompt one ended."""

    def __init__(self, shapes: Iterable[StepShape]) -> None:
        decode = [(shape.num_decoding, _mean(shape)) for shape in shapes if shape.num_decoding]
        chunks = [_extent(shape) for shape in shapes if shape.chunks]
        self._decode = [(min(values), max(values)) for values in zip(*decode, strict=True)]
        self._chunks = [(min(values), max(values)) for values in zip(*chunks, strict=True)]

    def has(self, shape: StepShape) -> bool:
        decode = (shape.num_decoding, _mean(shape)) if shape.num_decoding else ()
        chunks = _extent(shape) if shape.chunks else ()
        return _inside(decode, self._decode) and _inside(chunks, self._chunks)


def _inside(values: tuple[float, ...], bounds: list[tuple[float, float]]) -> bool:
    if values and not bounds:
        return False
    return all(least <= value <= most for value, (least, most) in zip(values, bounds, strict=False))


def _extent(shape: StepShape) -> tuple[int, int]:
    return shape.num_chunk_tokens, max(chunk.num_before + chunk.num_new for chunk in shape.chunks)


def _mean(shape: StepShape) -> float:
    return shape.num_context / shape.num_decoding


def _size(value: float) -> float:
    return SIZE_STEP ** round(math.log(value, SIZE_STEP))


def _rows(points: Iterable[Point]) -> Rows | None:
    listed = list(points)
    return Rows(_smooth(listed)) if listed else None


def _smooth(points: Iterable[Point]) -> Iterator[Point]:
    for row, line in lines_of(points).items():
        ratios = list(line.values())
        inner = [median(ratios[index - 1 : index + 2]) for index in range(1, len(ratios) - 1)]
        yield from ((row, size, ratio) for size, ratio in zip(line, [ratios[0], *inner, ratios[-1]], strict=False))
