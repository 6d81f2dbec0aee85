"""Every carrier through links that fail: the right bytes and tokens, or a typed error in time; nothing leaks.

Twice: one outbox and one puller, where bytes can be compared; and a whole pair of workers with their engines, where the
request has to end with the tokens that it has without any fault, and every block has to come back.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from engine.errors import TransferFailed
from engine.types import Request, SamplingParams
from kv_transfer.config import TransferConfig
from kv_transfer.pull import Pulled, Puller
from tests.cluster.harness import LocalCluster, local_cluster
from tests.cluster.tiny_model import write_tiny_model
from tests.faults.goaway import NamedCodes
from tests.faults.relay import HEALED, Fault, Relay, relay_to
from tests.kv_transfer.fakes import PRODUCER, Transfer, transfer
from tests.kv_transfer.test_shm_carrier import serve
from tests.virtual import until

# Whatever is added here goes through all of this. dist does in tests/kv_transfer/test_dist_carrier.py.
CARRIERS = ("grpc", "shm")
PULL_TIMEOUT_S = 0.3
LIMIT_S = 10.0  # far more than all tries of a pull together
FAULTS = {
    "delay": Fault(delay_s=0.01),
    "reordered": Fault(reorders=True),
    "half-open": Fault(swallows=True),
    "cut": Fault(is_cut=True),
    "flipped bits": Fault(flip_every=97),
    "one flipped bit": Fault(flip_once_at=400),
    "truncated": Fault(truncate_at=300),
    "duplicated": Fault(duplicates=True),
}
HARMLESS = ("delay",)
LASTING = ("half-open", "cut", "flipped bits")  # no try can succeed
each_carrier = pytest.mark.parametrize("carrier", CARRIERS)
each_fault = pytest.mark.parametrize("kind", FAULTS)


# --- an outbox and a puller ------------------------------------------------------------------------------------


@dataclass(eq=False)
class Linked:
    """One transfer whose consumer reaches the producer by the relay only."""

    case: Transfer
    relay: Relay
    puller: Puller

    async def pull(self) -> Pulled:
        async with asyncio.timeout(LIMIT_S):
            return await self.puller.run(PULL_TIMEOUT_S)


@asynccontextmanager
async def linked(carrier: str) -> AsyncIterator[Linked]:
    """The pair has met and been measured."""
    with transfer(60, producer=replace(PRODUCER, incarnation=secrets.token_hex(8))) as case:
        config = TransferConfig.model_validate({"carrier": carrier})
        async with serve(case, config) as served, relay_to(served.lease.address, NamedCodes) as (relay, address):
            lease = replace(served.lease, address=address)
            await served.carriers.pair(lease)
            chosen = served.carriers.carrier(lease)
            yield Linked(case, relay, Puller(case.target.layout, case.target, case.target_ids, chosen, lease))


@each_carrier
@each_fault
async def test_the_right_bytes_or_a_typed_error_and_nothing_written_elsewhere(carrier: str, kind: str) -> None:
    async with linked(carrier) as link:
        link.case.compute(20)
        link.relay.set(FAULTS[kind])
        pull = asyncio.ensure_future(link.pull())
        link.case.commit()
        try:
            pulled = await pull
        except TransferFailed:
            assert kind not in HARMLESS
        else:
            assert kind not in LASTING
            assert all(link.case.arrived())
            assert pulled.carrier == carrier
        assert link.case.others_untouched()


@each_carrier
@pytest.mark.parametrize("kind", [kind for kind in FAULTS if kind not in HARMLESS])
async def test_a_link_that_heals_in_time_costs_resumes_and_brings_the_right_bytes(carrier: str, kind: str) -> None:
    async with linked(carrier) as link:
        link.case.compute(20)
        pull = asyncio.ensure_future(link.pull())
        await until(lambda: link.case.arrived()[0])
        link.relay.set(FAULTS[kind])
        link.case.compute(40)
        await asyncio.sleep(0.02)
        link.relay.set(HEALED)
        link.relay.reset()
        link.case.commit()
        with suppress(TransferFailed):  # a link that was refused may be left alone for longer than a pull has patience
            assert (await pull).num_resumes > 0
            assert all(link.case.arrived())
        assert link.case.others_untouched()


# --- a pair of workers ------------------------------------------------------------------------------------------


PROMPT = tuple(token % 200 for token in range(700))
ANSWER = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


@dataclass(eq=False)
class Pair:
    cluster: LocalCluster
    relay: Relay
    num_asked: int = 0

    async def tokens(self) -> list[int]:
        self.num_asked += 1
        request = Request(f"r{self.num_asked}", PROMPT, ANSWER, timeout_s=LIMIT_S)
        return [token async for output in self.cluster.dispatcher.generate(request) for token in output.token_ids]

    @property
    def num_failed(self) -> int:
        return self.cluster.workers["decode-0"]._sides.status().transfers.num_failed

    @property
    def num_resumes(self) -> int:
        return self.cluster.workers["decode-0"]._sides.status().transfers.num_resumes

    async def nothing_is_held(self) -> None:
        statuses = [worker._sides.status for worker in self.cluster.workers.values()]

        def is_idle() -> bool:
            now = [status() for status in statuses]
            free = all(one.stats.num_free_blocks == one.stats.num_blocks for one in now)
            return free and not any(one.num_leases or one.num_pulls or one.num_streams for one in now)

        await until(is_idle, LIMIT_S)
        assert [status().stats.num_leaked_blocks for status in statuses] == [0, 0]


@asynccontextmanager
async def worker_pair(carrier: str, folder: Path) -> AsyncIterator[Pair]:
    """Prefill tells decode an address behind which the relay is; all else goes by other links. No prefix cache, so that
    each request moves all of its blocks."""
    overrides = {
        "model.name": str(write_tiny_model(folder / "model")), "engine.runner": "thread", "router.canary_s": 600.0,
        "kv_transfer.carrier": carrier, "kv_transfer.pull_timeout_s": PULL_TIMEOUT_S, "kv_transfer.frame_bytes": 4096,
        "kv_transfer.heartbeat_s": 0.1, "kv_transfer.lease_ttl_s": 0.5, "engine.prefix_cache": False,
    }  # fmt: skip
    async with local_cluster(overrides) as cluster:
        side = cluster.workers["prefill-0"]._sides._prefill
        async with relay_to(side._me.address, NamedCodes) as (relay, address):
            side._me = replace(side._me, address=address)
            yield Pair(cluster, relay)


@each_carrier
async def test_whatever_the_link_does_a_request_has_its_tokens_and_no_block_stays_held(
    carrier: str, tmp_path: Path
) -> None:
    """One pair through all faults, one after the other."""
    async with worker_pair(carrier, tmp_path) as pair:
        wanted = await pair.tokens()
        for kind, fault in FAULTS.items():
            failed_before, resumed_before = pair.num_failed, pair.num_resumes
            pair.relay.set(fault)
            assert await pair.tokens() == wanted, kind
            await pair.nothing_is_held()
            struck = pair.num_failed > failed_before or pair.num_resumes > resumed_before
            assert struck or kind in HARMLESS, kind
            pair.relay.set(HEALED)
            pair.relay.reset()
        assert pair.num_asked == len(FAULTS) + 1
