"""Waiting for the first of several, and for no longer than a limit."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Coroutine

log = logging.getLogger(__name__)


async def first_of(*lives: Coroutine[None, None, str]) -> str:
    """What the first of them to end returned or raised; the others are cancelled."""
    tasks = [asyncio.ensure_future(life) for life in lives]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(iter(done)).result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def within(limit_s: float, step: Awaitable[None]) -> None:
    """One step of clearing away: bounded, and its failure must not keep the next one from being done."""
    try:
        async with asyncio.timeout(limit_s):
            await step
    except Exception as error:
        log.warning("a step of clearing away failed: %s", str(error) or type(error).__name__)
