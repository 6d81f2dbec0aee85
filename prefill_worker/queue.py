"""The prefill queue: earliest deadline first, and not faster than decode takes the results away."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field, replace

from engine.errors import Overloaded
from engine.types import EngineStats, Key, Submission

# Prompts handed to the engine ahead of need, so that it never idles between two steps.
ENGINE_BACKLOG = 8


@dataclass(order=True, slots=True)
class Waiting:
    """A submission in the queue; times are of the running loop's clock."""

    deadline: float
    number: int  # first come first served among equal deadlines
    submission: Submission = field(compare=False)
    arrived: float = field(compare=False)


class PrefillQueue:
    """Ordered by deadline. Pure: it is told the time and the engine's load."""

    def __init__(self, max_queue: int, outbox_fraction: float) -> None:
        self._max_queue = max_queue
        self._outbox_fraction = outbox_fraction
        self._heap: list[Waiting] = []
        self._next_number = 0

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, submission: Submission, now: float) -> None:
        """Raises Overloaded when the queue is full."""
        if len(self._heap) >= self._max_queue:
            raise Overloaded(f"{len(self._heap)} requests wait for prefill already", retry_after_s=1)
        deadline = now + submission.request.timeout_s
        heapq.heappush(self._heap, Waiting(deadline, self._next_number, submission, now))
        self._next_number += 1

    def pop_ready(self, stats: EngineStats, num_given: int) -> Waiting | None:
        """The next to start, or None while the engine has enough or unclaimed blocks fill the outbox's share.

        `num_given`: submissions that the engine has and that have not started."""
        room = stats.num_held_blocks <= self._outbox_fraction * stats.num_blocks
        if self._heap and room and num_given < ENGINE_BACKLOG:
            return heapq.heappop(self._heap)
        return None

    def remove(self, key: Key) -> bool:
        """Take an answer that was aborted out of its submission, and this with its last one out of the queue."""
        found = next((item for item in self._heap if key in [one.key for one in item.submission.requests]), None)
        if found is None:
            return False
        kept = [one for one in found.submission.requests if one.key != key]
        if kept:
            found.submission = replace(found.submission, request=kept[0], siblings=tuple(kept[1:]))
            return True
        self._heap.remove(found)
        heapq.heapify(self._heap)
        return True

    @property
    def num_tokens(self) -> int:
        """Prompt positions that wait."""
        return sum(item.submission.request.num_tokens for item in self._heap)
