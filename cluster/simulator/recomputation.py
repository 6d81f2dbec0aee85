"""Recomputation: positions that workers compute although they, or others, have computed them before, and why.

Of one request:
1. `computed` sees each part of a batch that is no plain decoding, as it is computed;
2. a placement that is given up (`retried`) leaves what it computed as lost, for the error that ended it; what a cache
   still has of it is never computed again, and so never counted;
3. a sequence that goes back behind what its own placement has computed was preempted.
Each position is charged to what lost it last.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from engine.engine import ModelRunner
from engine.layer_groups import LayersStored
from engine.scheduler import Batch, Scheduled
from engine.types import Key, Sampled

PREEMPTED = "preempted"
UNKNOWN = "unknown"  # a new placement of which no error was told


@dataclass(slots=True, eq=False)
class _Work:
    """On one request. `epoch`: of the placement that computed last, `num_done` positions from 0. `lost`: (stop, cause),
    by stop; each reaches from the one before it. `causes`: of each epoch that was given up, which may be known before
    it is seen what it computed."""

    epoch: int
    num_done: int = 0
    lost: list[tuple[int, str]] = field(default_factory=list)
    causes: dict[int, str] = field(default_factory=dict)

    def lose(self, cause: str) -> None:
        """All that is done."""
        self.lost = [(self.num_done, cause), *(one for one in self.lost if one[0] > self.num_done)]
        self.num_done = 0


class Recomputation:
    """Counts over all requests."""

    def __init__(self) -> None:
        self.num_first = 0  # positions that were computed for the first time
        self._again: Counter[str] = Counter()
        self._works: dict[str, _Work] = {}

    @property
    def by_cause(self) -> tuple[tuple[str, int], ...]:
        """Positions that were computed again: by an error's code, PREEMPTED or UNKNOWN."""
        return tuple(sorted(self._again.items()))

    def retried(self, key: Key, cause: str) -> None:
        """This placement is given up."""
        self._works.setdefault(key.request_id, _Work(key.epoch)).causes[key.epoch] = cause

    def forget(self, request_id: str) -> None:
        self._works.pop(request_id, None)

    def computed(self, item: Scheduled) -> None:
        sequence = item.sequence
        key, request = sequence.key, sequence.request
        work = self._works.setdefault(key.request_id, _Work(key.epoch))
        if key.epoch > work.epoch:
            if request.generated_ids:  # they were sampled after all positions before the last of them
                work.num_done = max(work.num_done, request.num_tokens - 1)
            work.lose(work.causes.get(work.epoch, UNKNOWN))
            work.epoch = key.epoch
        if sequence.num_generated > len(request.generated_ids):
            work.num_done = max(work.num_done, len(sequence.tokens) - 1)
        if item.start < work.num_done:
            work.lose(PREEMPTED)
        self._count(work, item.start, item.start + item.num_new)

    def _count(self, work: _Work, start: int, stop: int) -> None:
        work.num_done = stop
        for end, cause in work.lost:
            if start < (end := min(end, stop)):
                self._again[cause] += end - start
                start = end
        self.num_first += stop - start


class CountedRunner:
    """Implements engine.engine.ModelRunner: another one, of which it is counted what it computes."""

    def __init__(self, runner: ModelRunner, recomputation: Recomputation) -> None:
        self._runner = runner
        self._recomputation = recomputation

    def execute(self, batch: Batch, stored: LayersStored | None = None) -> list[Sampled]:
        for item in batch.scheduled:
            if not item.sequence.is_decoding:
                self._recomputation.computed(item)
        return self._runner.execute(batch, stored)
