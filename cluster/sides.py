"""The sides of a worker: prefill, decode, and the token streams of both, over one engine.

1. calls: `submit`, `take_offer`, `abort`, `move`, `copy`, `borrow`, `subscribe`; those who pull read `outbox`;
2. `serve` gives each turn of the engine to both sides and then its tokens to the gateways, and sends heartbeats;
3. it returns when the engine is gone: this life of the worker is then over.

It knows no network, no process and no tensors. Links and engine are handed in, so the simulator's workers are these.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Protocol

from cluster.config import ClusterConfig
from decode_worker.intake import Intake
from decode_worker.mover import MovePeers, Mover
from decode_worker.totals import TransferTotals
from engine.errors import StaleEpoch, WorkerLost
from engine.planes import CacheLayout
from engine.pool import BlockBytes
from engine.step_account import StepAccount
from engine.streams import StreamBatch, TokenStreams
from engine.types import Command, Endpoint, EngineStats, Key, Move, Role, StepOutputs, Submission
from kv_transfer.carrier import CarrierPool
from kv_transfer.fetcher import Fetcher, Lenders
from kv_transfer.lease import Loan, Offer
from kv_transfer.lender import Lender
from prefill_worker.forecast import Forecast
from prefill_worker.outbox import Outbox
from prefill_worker.queue import PrefillQueue
from prefill_worker.side import DecodePeers, PrefillSide
from router.membership import Member

log = logging.getLogger(__name__)


class Peers(DecodePeers, MovePeers, Lenders, Protocol):
    """Reaches other workers, for both sides."""


@dataclass(frozen=True, slots=True)
class Links:
    """How a worker reaches others."""

    peers: Peers
    carriers: CarrierPool


@dataclass(frozen=True, slots=True)
class Cache:
    """The engine's KV pool, as transfers see it."""

    layout: CacheLayout
    num_blocks: int
    pool: BlockBytes
    hash_key: bytes  # of prefix hashes


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A worker's own account of itself."""

    endpoint: Endpoint
    role: Role
    role_epoch: int
    stats: EngineStats
    num_queued: int
    num_leases: int
    num_pulls: int
    num_streams: int
    transfers: TransferTotals
    last_step_s: float

    @property
    def num_open(self) -> int:
        """What it has to do or to keep for somebody."""
        return self.num_queued + self.num_leases + self.num_pulls + self.num_streams


class WorkerSides:
    def __init__(
        self, me: Endpoint, role: Role, cache: Cache, links: Links, send: Callable[[Command], None],
        config: ClusterConfig, new_secret: Callable[[], str],
    ) -> None:  # fmt: skip
        transfer = config.kv_transfer
        self._me = me
        self._role = role
        self._role_epoch = 0
        self._kv_token_bytes = cache.layout.bytes_per_token
        self._heartbeat_s = transfer.heartbeat_s
        self._stats = EngineStats(num_blocks=cache.num_blocks, num_free_blocks=cache.num_blocks)
        self._last_step_s = 0.0
        self._aborting: list[asyncio.Task[None]] = []
        self.streams = TokenStreams(config.decode.orphan_s, self._abort_soon)
        self._account = StepAccount(lambda key: self.streams.owner(key) is not None)
        self.streams.publish((), self._stats)  # an engine that has done nothing yet says nothing
        self.outbox = Outbox(
            cache.layout, cache.pool, transfer.frame_bytes, transfer.lease_ttl_s, new_secret, self._lease_ended
        )
        queue = PrefillQueue(config.prefill.queue_rules(config.engine))
        self._intake = Intake(me, cache.layout, cache.pool, links.carriers, self.streams, send, config.decode, transfer)
        take = self._intake.take_loan
        fetcher = Fetcher(cache.hash_key, cache.layout.block_size, links.peers, links.carriers, take)
        prefixes = fetcher if config.prefill.fetch_prefixes and config.engine.prefix_cache else None
        engine, prefill = config.engine, config.prefill
        forecast = Forecast(engine.prefill_chunk, engine.max_batch_tokens, prefill.refuse_late, prefill.knee_tokens)
        self._prefill = PrefillSide(
            me, queue, self.outbox, self.streams, links.peers, send, prefixes, cache.layout.bytes_per_token, forecast
        )
        self._lender = Lender(me, self.outbox, self._intake.questions, send)
        self._mover = Mover(me, self._lender, self.outbox, self._intake.questions, self.streams, links.peers, send)

    @property
    def member(self) -> Member:
        me = self._me
        return Member(
            me.worker_id, me.incarnation, self._role, self._role_epoch, me.address, me.cohort, self._kv_token_bytes
        )

    # --- calls ---------------------------------------------------------------------------------------------

    def relabel(self, role: Role, role_epoch: int) -> None:
        """From now on its pool is another; what it has goes on. Raises StaleEpoch for an order that is overtaken."""
        if (role, role_epoch) == (self._role, self._role_epoch):
            return
        if role_epoch <= self._role_epoch:
            raise StaleEpoch(f"role epoch {role_epoch} is not newer than {self._role_epoch}")
        self._role, self._role_epoch = role, role_epoch

    def submit(self, submission: Submission, role_epoch: int) -> None:
        if role_epoch < self._role_epoch:
            raise StaleEpoch(f"role epoch {role_epoch} is older than {self._role_epoch}")
        self._prefill.submit(submission)

    async def abort(self, key: Key) -> None:
        self._mover.abort(key)
        if not self._prefill.abort(key):
            await self._intake.abort(key)

    async def take_offer(self, offer: Offer) -> None:
        await self._intake.reserve(offer)

    async def move(self, move: Move) -> None:
        """Returns when it is done. Raises TransferFailed or Overloaded when it is not, and nothing has changed."""
        if move.to is None:
            await self._mover.back_up(move.key, move.target, move.timeout_s)
        else:
            await self._mover.move(move.key, move.target, move.to, move.timeout_s)

    async def copy(self, loan: Loan) -> None:
        await self._intake.take_loan(loan)

    async def borrow(self, names: tuple[bytes, ...]) -> Loan | None:
        return await self._lender.lend(names)

    def subscribe(self, gateway_id: str) -> AsyncGenerator[StreamBatch]:
        return self.streams.subscribe(gateway_id)

    def status(self) -> WorkerStatus:
        return WorkerStatus(
            self._me, self._role, self._role_epoch, self._stats, self._prefill.num_queued, self.outbox.num_leases,
            self._intake.num_pulls, self.streams.num_keys, self._intake.totals, self._last_step_s,
        )  # fmt: skip

    # --- life ----------------------------------------------------------------------------------------------

    async def serve(self, next_outputs: Callable[[], Awaitable[StepOutputs]]) -> str:
        """Serve until `next_outputs` raises WorkerLost; returns why. Cancelled, it leaves no task behind."""
        reason = ""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._tick())
                while True:
                    self._distribute(await next_outputs())
        except* WorkerLost as lost:
            reason = str(lost.exceptions[0])
        finally:
            for task in self._aborting:
                task.cancel()
            await asyncio.gather(*self._aborting, return_exceptions=True)
        return reason

    def _distribute(self, outputs: StepOutputs) -> None:
        """Give a turn's outputs to both sides, then to the gateways."""
        if outputs.calibration:
            self.streams.publish_calibration(outputs.calibration)
        self.streams.publish_cache(outputs.cache)
        self._last_step_s = outputs.steps[-1].step_s if outputs.steps else self._last_step_s
        tokens = self._prefill.on_outputs(outputs)
        outputs = outputs if tokens == outputs.tokens else replace(outputs, tokens=tokens)
        step_s = outputs.steps[-1].step_s if outputs.steps else 0.0
        tokens = self._account.take(self._intake.on_outputs(outputs), step_s, asyncio.get_running_loop().time())
        self._stats = self._with_queue(outputs.stats)
        self.streams.publish(tokens, self._stats, outputs.steps)

    def _with_queue(self, stats: EngineStats) -> EngineStats:
        num_tokens, queued_s = self._prefill.num_queued_tokens, self._prefill.queued_s
        return replace(stats, num_queued_tokens=num_tokens, queued_s=queued_s) if num_tokens or queued_s else stats

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._heartbeat_s)
            self.outbox.expire()
            await self._intake.beat()

    def _lease_ended(self, key: Key) -> None:
        self._prefill.on_lease_end(key)

    def _abort_soon(self, key: Key) -> None:
        """Its gateway has been gone for too long."""
        log.warning("%s has no reader any more and is aborted", key)
        self._aborting = [task for task in self._aborting if not task.done()]
        self._aborting.append(asyncio.get_running_loop().create_task(self.abort(key)))
