"""What waits for a slow reader: outputs in order, merged when they are read.

A reader that keeps up gets each output as it came. One that does not gets all that waits in few pieces, so that it
catches up cheaply: a piece costs the same however many tokens it has. The tokens and their order do not change.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

from engine.errors import SteelyardError
from engine.types import TokenOutput

MAX_MERGED_TOKENS = 256  # bounds one event of a stream, and the time that writing it holds the loop


class Backlog:
    """A queue of outputs, or of errors, which are passed on as they are. For one reader."""

    def __init__(self) -> None:
        self._events: deque[TokenOutput | SteelyardError] = deque()
        self._waiter: asyncio.Future[None] | None = None  # its reader, while nothing is there

    def put_nowait(self, event: TokenOutput | SteelyardError) -> None:
        self._events.append(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    @property
    def is_awaited(self) -> bool:
        """Its reader has had all that came, and waits for more."""
        return self._waiter is not None and not self._waiter.done()

    def clear(self) -> None:
        self._events.clear()

    async def get(self) -> TokenOutput | SteelyardError:
        """The next error, or the outputs that wait before it as one. The caller bounds the wait."""
        while not self._events:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        event = self._events.popleft()
        if not self._events or isinstance(event, SteelyardError):
            return event
        return merge([event, *self._followers_of(event)])

    def _followers_of(self, first: TokenOutput) -> list[TokenOutput]:
        """Those to be merged with the first, taken from the queue."""
        followers: list[TokenOutput] = []
        last, num_tokens = first, len(first.token_ids)
        while self._events:
            following = self._events[0]
            if isinstance(following, SteelyardError) or not follows(last, following):
                break
            num_tokens += len(following.token_ids)
            if num_tokens > MAX_MERGED_TOKENS:
                break
            self._events.popleft()
            followers.append(following)
            last = following
        return followers


def follows(left: TokenOutput, right: TokenOutput) -> bool:
    """Is `right` what comes next after `left`, which has not ended?"""
    ended = left.finish is not None or left.error is not None
    return not ended and left.key == right.key and right.first_index == left.first_index + len(left.token_ids)


def merge(outputs: Sequence[TokenOutput]) -> TokenOutput:
    """One output that says what these, of which each follows the one before, say together."""
    if len(outputs) == 1:
        return outputs[0]
    assert all(map(follows, outputs, outputs[1:])), "outputs are merged in order and without a gap"
    return replace(
        outputs[-1],
        first_index=outputs[0].first_index,
        token_ids=tuple(chain.from_iterable(one.token_ids for one in outputs)),
        cached_tokens=max(one.cached_tokens for one in outputs),
        stages=tuple(chain.from_iterable(one.stages for one in outputs)),
        logprobs=tuple(chain.from_iterable(one.logprobs for one in outputs)),
        prompt_logprobs=tuple(chain.from_iterable(one.prompt_logprobs for one in outputs)),
        transfer=next((one.transfer for one in reversed(outputs) if one.transfer), None),
    )
