"""Draining: a worker that is to leave for good gets nothing new, and what it has moves on or ends there first.

What is still there when its time is up ends with it: gateways place such requests again, and no token is lost.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Protocol

from router.membership import Member

LOOK_S = 0.2
EVACUATION_S = 5.0  # then it is looked anew what may move


class Drainable(Protocol):
    """The cluster, as far as it is changed. Errors are SteelyardError."""

    def relist(self, member: Member) -> None:
        """Everybody routes by this from now on."""
        ...

    async def evacuate(self, member: Member, limit_s: float) -> int:
        """How many requests are still placed there, for either phase, after about this time at most."""
        ...

    async def num_open(self, member: Member) -> int:
        """Prompts, streams, leases and pulls that it has now, by its own word."""
        ...


async def drain(cluster: Drainable, member: Member, limit_s: float) -> int:
    """How much it still has in the end. Raises Unavailable or WorkerLost when its life is over before."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + limit_s
    cluster.relist(replace(member, is_leaving=True))
    while (left_s := deadline - loop.time()) > 0:
        await asyncio.sleep(min(LOOK_S, left_s))  # the first time, for everybody to hear of it
        left_s = max(0.0, deadline - loop.time())
        num_placed = await cluster.evacuate(member, min(left_s, EVACUATION_S))
        num_open = await cluster.num_open(member)
        if not num_placed and not num_open:
            return 0
    return await cluster.num_open(member)
