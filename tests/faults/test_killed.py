"""Workers in processes of their own that starve or die in the midst of a request, without warning.

The request has the tokens that it has undisturbed, from who is left, before its deadline; and nothing stays held there.
One cluster serves all tests of this file, in their order.
"""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio

from tests.cluster.test_carriers import carried
from tests.cluster.test_served_model import is_alive, parent_of, pids
from tests.faults.processes import ProcessCluster, process_cluster
from tests.faults.worker_process import FATAL_PREFILL, FATAL_PULL, STARVED, STARVED_AT_THE_DOOR

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

ORPHAN_S = 10.0  # an engine whose worker is gone reads that after its step, and its process then has to end
RECONNECTED_S = 20.0  # a channel that could not be opened is left alone for a second


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ProcessCluster]:
    async with process_cluster(tmp_path_factory.mktemp("killed")) as started:
        await asyncio.gather(*map(started.start, ("prefill-0", "decode-0", "decode-1")))
        yield started


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def wanted(cluster: ProcessCluster) -> list[int]:
    """By one worker that does both phases."""
    await cluster.list_only("prefill-0")
    return await cluster.tokens("undisturbed")


async def test_a_worker_with_no_descriptor_for_a_pool_takes_the_blocks_by_grpc_and_says_so(
    cluster: ProcessCluster, wanted: list[int]
) -> None:
    await cluster.list_only("prefill-0", "decode-0")
    assert await cluster.tokens(STARVED_AT_THE_DOOR) == wanted
    await cluster.nothing_is_held()
    told = cluster.workers["decode-0"].log.read_text()
    assert re.search("not shm: no pool of .* can be read on this host: Too many open files", told), told
    async with httpx.AsyncClient(base_url=cluster.local.url) as client:
        metrics = (await client.get("/metrics")).text
    assert carried(metrics, "steelyard_kv_transfers", "grpc") == 1
    assert carried(metrics, "steelyard_kv_transfers", "shm") == 0


async def test_a_worker_with_no_descriptor_at_all_computes_the_request_itself(
    cluster: ProcessCluster, wanted: list[int]
) -> None:
    """It cannot even reach its producer; and soon after it can."""
    await cluster.list_only("prefill-0", "decode-1")
    assert await cluster.tokens(STARVED) == wanted
    await cluster.nothing_is_held()
    status = (await cluster.statuses())["decode-1"]
    assert (status.transfers, status.transfers_failed) == (0, 1)
    async with asyncio.timeout(RECONNECTED_S):
        while not (await cluster.statuses())["decode-1"].transfers:
            assert await cluster.tokens("later") == wanted


@pytest.mark.parametrize(
    ("fatal", "victim", "partner", "left"),
    [
        (FATAL_PULL, "decode-0", "prefill-0", ["prefill-0", "decode-1"]),
        (FATAL_PREFILL, "prefill-0", "decode-1", ["decode-1"]),
    ],
    ids=["consumer", "producer"],
)
async def test_a_request_outlives_a_worker_that_is_killed_in_the_midst_of_its_transfer(
    cluster: ProcessCluster, wanted: list[int], fatal: str, victim: str, partner: str, left: list[str]
) -> None:
    """One when some frames have come, by gRPC; the other when some have been told, out of its memory."""
    await cluster.list_only(partner, victim)
    (engine,) = [pid for pid in pids() if parent_of(pid) == cluster.workers[victim].process.pid]
    answer = asyncio.create_task(cluster.tokens(fatal))
    assert await cluster.workers[victim].is_dead() == -signal.SIGKILL
    await cluster.list_only(*left)
    assert await answer == wanted
    await cluster.nothing_is_held()
    async with asyncio.timeout(ORPHAN_S):
        while is_alive(engine):  # noqa: ASYNC110 (nobody is told when another's child ends)
            await asyncio.sleep(0.01)
