"""Lanes: many prompts through one Generator, so many at a time and no more."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from engine.types import Request, TokenOutput
from router.api import Generator
from router.fan_in import fan_in

MAX_LANES = 32  # of one body: enough for full steps, few enough to leave others their seats


def in_lanes(
    generator: Generator, requests: Sequence[Request], max_lanes: int = MAX_LANES
) -> AsyncGenerator[TokenOutput]:
    """The outputs of all as they come. What fails one fails all; one that begins late gets what is left of its time."""
    ends = [asyncio.get_running_loop().time() + one.timeout_s for one in requests]
    timed = [*zip(requests, ends, strict=True)]
    lanes = [_lane(generator, timed[lane::max_lanes]) for lane in range(min(max_lanes, len(timed)))]
    return lanes[0] if len(lanes) == 1 else fan_in(lanes)


async def _lane(generator: Generator, timed: Sequence[tuple[Request, float]]) -> AsyncGenerator[TokenOutput]:
    """One after the other. No pace is promised where there is no token after the first."""
    for request, end in timed:
        timeout_s = max(0.0, end - asyncio.get_running_loop().time())
        service = replace(request.service, tpot_s=math.inf)
        async with aclosing(generator.generate(replace(request, timeout_s=timeout_s, service=service))) as outputs:
            async for output in outputs:
                yield output
