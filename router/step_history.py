"""The history of steps: what the workers computed lately, and how long it took, as this gateway has heard.

1. `add` numbers a worker's records as they come, over all workers; of each worker the last MAX_STEPS are kept;
2. `since` gives those after a number, for a reader that comes again, oldest first. What it missed shows in the numbers;
3. `forget` drops a life of a worker that has left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from heapq import merge
from itertools import islice

from engine.step_shape import StepRecord
from engine.types import Role
from router.membership import Member
from router.tally import Tally

MAX_STEPS = 4096  # of one worker: minutes of a small model's decoding
MAX_TOLD = 2048  # in one answer
TOKENS_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)  # vLLM's


@dataclass(frozen=True, slots=True)
class HeardStep:
    """`number` counts all steps that the gateway has heard of, from 1."""

    number: int
    worker_id: str
    incarnation: str
    role: Role
    record: StepRecord


@dataclass(frozen=True, slots=True)
class StepsView:
    """Steps in order of their numbers. `last`: the number to go on from."""

    steps: tuple[HeardStep, ...]
    last: int


class StepHistory:
    def __init__(self, max_steps: int = MAX_STEPS) -> None:
        self._max_steps = max_steps
        self.tokens = Tally(TOKENS_BUCKETS)  # of all steps ever heard of
        self._num_heard = 0
        self._by_worker: dict[tuple[str, str], deque[HeardStep]] = {}

    def add(self, member: Member, records: Iterable[StepRecord]) -> None:
        name = (member.worker_id, member.incarnation)
        for record in records:
            self._num_heard += 1
            self.tokens.observe(record.shape.num_chunk_tokens + record.shape.num_decoding)
            step = HeardStep(self._num_heard, member.worker_id, member.incarnation, member.role, record)
            self._by_worker.setdefault(name, deque(maxlen=self._max_steps)).append(step)

    def since(self, number: int, max_told: int = MAX_TOLD) -> StepsView:
        """The first steps after this number that are still known."""
        later = ((step for step in steps if step.number > number) for steps in self._by_worker.values())
        told = tuple(islice(merge(*later, key=lambda step: step.number), max_told))
        return StepsView(told, told[-1].number if told else self._num_heard)

    def forget(self, worker_id: str, incarnation: str) -> None:
        self._by_worker.pop((worker_id, incarnation), None)
