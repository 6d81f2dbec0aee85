"""Async tests: in virtual time, where timeouts pass at once and a wait for what can never come is an error; and waiting
for what has no event."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec

from cluster.simulator.clock import run_virtual

LIMIT_S = 100_000.0

Params = ParamSpec("Params")


def in_virtual_time(test: Callable[Params, Coroutine[Any, Any, None]]) -> Callable[Params, None]:
    @functools.wraps(test)
    def run(*args: Params.args, **kwargs: Params.kwargs) -> None:
        run_virtual(test(*args, **kwargs), LIMIT_S)

    return run


async def settle(turns: int = 20) -> None:
    """Let everything that is ready run, without time passing."""
    for _ in range(turns):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Returns when the condition holds; an error if it does not in time."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)
