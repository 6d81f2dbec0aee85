"""A prefill and a decode worker in network namespaces of their own: the link between them is slow, cut, loses packets.

The request has the tokens that it has undisturbed before its deadline, and nothing stays held at either end. One pair
serves all tests of this file. Where namespaces are not permitted it is skipped; tests/faults/test_links.py never is.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

from cluster.rpc.control_pb2 import WorkerStatus
from tests.faults.namespaces import Joined, NotHere, namespaces
from tests.faults.processes import DEADLINE_S, ProcessCluster, process_cluster

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

SLOW = "2mbit"  # the prompt's KV takes about two seconds
SOME_BYTES = 50_000  # of its 400,000
ONE_IN = 8


@dataclass(frozen=True, slots=True)
class Pair:
    cluster: ProcessCluster
    link: Joined
    wanted: list[int]

    async def decode(self) -> WorkerStatus:
        return (await self.cluster.statuses())["decode-0"]

    async def transfers_again(self) -> None:
        """Soon: a channel that was cut off is left alone for a second."""
        before = (await self.decode()).transfers
        async with asyncio.timeout(DEADLINE_S):
            while (await self.decode()).transfers == before:
                assert await self.cluster.tokens("again") == self.wanted


@pytest.fixture(scope="module")
def joined() -> Iterator[Joined]:
    try:
        with namespaces() as made:
            yield made
    except NotHere as why:
        pytest.skip(str(why))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(joined: Joined, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    async with process_cluster(tmp_path_factory.mktemp("namespaces")) as cluster:
        await asyncio.gather(
            cluster.start("prefill-0", joined.a.enter, joined.a.address),
            cluster.start("decode-0", joined.b.enter, joined.b.address),
        )
        await cluster.list_only("prefill-0", "decode-0")
        yield Pair(cluster, joined, await cluster.tokens("undisturbed"))


async def test_a_whole_link_carries_the_blocks(pair: Pair) -> None:
    before = pair.link.num_sent_bytes()
    await pair.transfers_again()
    assert pair.link.num_sent_bytes() > before + SOME_BYTES


async def test_a_slow_link_carries_them_too(pair: Pair) -> None:
    before = await pair.decode()
    pair.link.slow(SLOW)
    try:
        assert await pair.cluster.tokens("slow") == pair.wanted
    finally:
        pair.link.fast()
    await pair.cluster.nothing_is_held()
    after = await pair.decode()
    assert (after.transfers, after.transfers_failed) == (before.transfers + 1, before.transfers_failed)


@pytest.mark.parametrize("heals", [False, True], ids=["for good", "for a moment"])
async def test_a_link_that_is_cut_while_blocks_cross_it(pair: Pair, heals: bool) -> None:
    before, num_sent = await pair.decode(), pair.link.num_sent_bytes()
    pair.link.slow(SLOW)
    try:
        answer = asyncio.create_task(pair.cluster.tokens("cut"))
        async with asyncio.timeout(DEADLINE_S):
            while pair.link.num_sent_bytes() < num_sent + SOME_BYTES:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert (await pair.decode()).num_pulls == 1
        pair.link.cut()
        if heals:
            await asyncio.sleep(0.3)
            pair.link.join()
        assert await answer == pair.wanted
        await pair.cluster.nothing_is_held()
        assert heals or (await pair.decode()).transfers_failed == before.transfers_failed + 1
    finally:
        pair.link.join()
        pair.link.fast()
    await pair.transfers_again()


async def test_a_link_that_is_cut_before_a_request_comes(pair: Pair) -> None:
    before = await pair.decode()
    pair.link.cut()
    try:
        assert await pair.cluster.tokens("no link") == pair.wanted
        await pair.cluster.nothing_is_held()
        assert (await pair.decode()).transfers == before.transfers
    finally:
        pair.link.join()
    await pair.transfers_again()


async def test_a_link_that_loses_packets(pair: Pair) -> None:
    """The last one of this file: the loss stays."""
    before = pair.link.num_retransmitted()
    try:
        pair.link.lose(ONE_IN)
    except NotHere as why:
        pytest.skip(str(why))
    assert await pair.cluster.tokens("loss") == pair.wanted
    await pair.cluster.nothing_is_held()
    assert pair.link.num_retransmitted() > before
