"""Fetching: prefixes of prompts that other workers have in their caches, where that beats computing them.

1. `start` when a submission comes: its prefix is fetched while it waits in the queue, for no longer than computing it
   would take;
2. `take` when the engine could have it: what is still under way is waited for;
3. `stop` when it ends before.
A worker learns from its own steps how long a prompt's token takes it, and from its carriers how fast KV comes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from engine.pace import Pace
from engine.types import Endpoint, Key, Request, Submission

OVERHEAD_S = 0.005  # of a loan: two small calls, a turn of each engine


def is_worth_fetching(num_tokens: int, token_bytes: float, bytes_per_s: float | None, token_s: float | None) -> bool:
    """Would these tokens' KV be here before it is computed? Not as long as nothing was ever computed here; a link that
    was never measured is tried."""
    if token_s is None or num_tokens == 0:
        return False
    moving_s = 0.0 if bytes_per_s is None else num_tokens * token_bytes / bytes_per_s
    return OVERHEAD_S + moving_s < num_tokens * token_s


class Prefixes(Protocol):
    """Brings prefixes from other workers' caches into this one's."""

    async def fetch(
        self, request: Request, source: Endpoint, is_worth: Callable[[int, float | None], bool], timeout_s: float
    ) -> None:
        """Returns when what `source` has of the prompt is here, or will not be. `is_worth`: are so many tokens, over a
        link of so many bytes/s, or None if it was never measured?"""
        ...


class Fetches:
    """Of the submissions that the engine does not have yet."""

    def __init__(self, prefixes: Prefixes | None, token_bytes: float, pace: Pace) -> None:
        """`prefixes`: None where nothing is fetched. `token_bytes`: of the KV of one token."""
        self._pace = pace
        self._prefixes = prefixes
        self._token_bytes = token_bytes
        self._tasks: dict[Key, asyncio.Task[None]] = {}

    def start(self, submission: Submission) -> None:
        request, source, token_s = submission.request, submission.source, self._pace.token_s
        if self._prefixes is None or source is None or token_s is None:
            return
        if request.sampling.prompt_logprobs >= 0:  # its prompt is computed in any case
            return

        def is_worth(num_tokens: int, bytes_per_s: float | None) -> bool:
            return is_worth_fetching(num_tokens, self._token_bytes, bytes_per_s, token_s)

        timeout_s = min(request.timeout_s, token_s * request.num_tokens)
        fetch = self._prefixes.fetch(request, source, is_worth, timeout_s)
        self._tasks[request.key] = asyncio.get_running_loop().create_task(fetch)

    def take(self, key: Key) -> asyncio.Task[None] | None:
        """What is still under way for it."""
        fetch = self._tasks.pop(key, None)
        return None if fetch is None or fetch.done() else fetch

    def stop(self, key: Key) -> None:
        fetch = self._tasks.pop(key, None)
        if fetch is not None:
            fetch.cancel()
