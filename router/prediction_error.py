"""Prediction errors: how far off predictions were, of those that were made before what they foretold was known.

Of each kind the last KEPT relative errors are kept, of which /health and /metrics tell the median and the 90th
percentile.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from math import isfinite

KEPT = 512
SHORTEST_S = 0.001  # what is shorter is judged as if it took so long: event loops are no finer
SHORTEST_TRANSFER_S = 0.01  # nor is it waited for: what remains of most transfers is their COMMIT


class Prediction(StrEnum):
    """What is foretold."""

    PREFILL = "prefill"  # a step with chunks of prompts
    DECODE = "decode"  # a step without
    TRANSFER = "transfer"  # the part of one that a request waits for
    TTFT = "ttft"  # from placement to the first token


@dataclass(frozen=True, slots=True)
class PredictionError:
    """|predicted - measured| / measured over the last `num_judged` predictions of a kind."""

    kind: str
    num_judged: int
    median: float
    p90: float


class PredictionErrors:
    def __init__(self) -> None:
        self._last: dict[Prediction, deque[float]] = {kind: deque(maxlen=KEPT) for kind in Prediction}

    def add(self, kind: Prediction, predicted_s: float, measured_s: float) -> None:
        shortest_s = SHORTEST_TRANSFER_S if kind is Prediction.TRANSFER else SHORTEST_S
        predicted_s, measured_s = max(predicted_s, shortest_s), max(measured_s, shortest_s)
        if isfinite(predicted_s) and isfinite(measured_s):  # peers may say anything, and /health is JSON
            self._last[kind].append(abs(predicted_s - measured_s) / measured_s)

    def view(self) -> tuple[PredictionError, ...]:
        """Of the kinds of which something is known."""
        return tuple(_summary(kind, sorted(errors)) for kind, errors in self._last.items() if errors)


def _summary(kind: Prediction, errors: list[float]) -> PredictionError:
    count = len(errors)
    return PredictionError(kind, count, errors[(count - 1) // 2], errors[min(count - 1, 9 * count // 10)])
