"""Clients of a local cluster that compare what they get with the oracle."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing

from cluster.rpc.client import worker_status
from cluster.rpc.control_pb2 import WorkerStatus
from engine.types import Request
from router.dispatch import Dispatcher
from tests.cluster.harness import LocalCluster
from tests.oracle.combinations import Case, Tally


async def collect(dispatcher: Dispatcher, request: Request, so_far: list[int] | None = None) -> tuple[int, ...]:
    """All tokens of a request, which must come in order; `so_far` grows as they come."""
    tokens = [] if so_far is None else so_far
    async with aclosing(dispatcher.generate(request)) as outputs:
        async for output in outputs:
            assert output.first_index == len(tokens)
            tokens += output.token_ids
    return tuple(tokens)


async def check_cluster(cluster: LocalCluster, cases: Sequence[Case], at_once: int) -> Tally:
    """Send the cases through prefill and decode, so many at a time, and compare."""
    before = await num_transfers(cluster)
    places = asyncio.Semaphore(at_once)

    async def answer(case: Case) -> tuple[int, ...]:
        async with places:
            return await collect(cluster.dispatcher, case.request(cluster.dispatcher.new_request_id()))

    tally = Tally()
    for case, tokens in zip(cases, await asyncio.gather(*map(answer, cases)), strict=True):
        tally.count(case.prompt, case.rest, tokens, f"cluster, {at_once} at once")
    assert await num_transfers(cluster) >= before + len(cases), "a request was served without a hand-off"
    return tally


async def num_transfers(cluster: LocalCluster) -> int:
    """Hand-offs that the listed workers have taken."""
    return sum(status.transfers for status in (await statuses(cluster)).values())


async def statuses(cluster: LocalCluster) -> dict[str, WorkerStatus]:
    """What every listed worker says of itself, over the wire."""
    channels = cluster.gateway._channels
    return {
        name: await worker_status(channels, member.address, member.incarnation, timeout_s=5)
        for name, member in cluster.members.items()
    }


async def connected(cluster: LocalCluster, timeout_s: float = 10.0) -> None:
    """Returns when the gateway reads the tokens of every listed worker."""
    async with asyncio.timeout(timeout_s):
        while not all(view.connected for view in cluster.dispatcher.health().workers):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
