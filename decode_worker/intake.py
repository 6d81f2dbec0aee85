"""The intake of the decode side: reserve, pull, adopt, release.

An offer's way:
1. `reserve` asks the engine for blocks, for the prompt and the growth expected; no room is a refusal at once.
   Blocks that the engine has already under the prompt's names are among them;
2. a task pulls the others under the lease, while the producer still computes later ones;
3. a verified COMMIT: the engine adopts the sequence, the producer may release;
4. a failure: the reservation is given back and the gateway told. Of a lost lease its producer knows more, so we wait a
   moment before we tell: the gateway has then heard of it already, unless the producer is cut off or gone.
Heartbeats keep every open lease alive meanwhile. Several answers to one prompt arrive as one offer: it goes on for as
long as one of them is wanted.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from decode_worker.config import DecodeConfig
from decode_worker.totals import TransferTotals
from engine.errors import LeaseLost, Overloaded, SteelyardError, TransferFailed
from engine.planes import CacheLayout
from engine.pool import BlockBytes
from engine.questions import Questions
from engine.runs import Runs
from engine.step_account import STEPS
from engine.streams import TokenStreams
from engine.types import (
    Abort,
    Adopt,
    CarrierTotals,
    Command,
    Endpoint,
    EngineStats,
    ErrorInfo,
    Key,
    KvTransfer,
    Release,
    Reserve,
    Reserved,
    StepOutputs,
    TokenOutput,
    TransferReport,
)
from kv_transfer.carrier import RELEASE_TIMEOUT_S, CarrierPool, release
from kv_transfer.config import TransferConfig
from kv_transfer.copies import Copies
from kv_transfer.handoff import HandOff
from kv_transfer.lease import Lease, Loan, Offer, check_cohort
from kv_transfer.pull import Pulled, Puller

LOST_LEASE_GRACE_S = 1.0

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Arrival:
    """An offer from its reservation to its first token here. `keys`: the answers that are still wanted."""

    offer: Offer
    begun: float
    keys: list[Key]
    committed: float | None = None
    transfer: KvTransfer | None = None
    task: asyncio.Task[None] | None = None


class Intake:
    def __init__(
        self, me: Endpoint, layout: CacheLayout, pool: BlockBytes, carriers: CarrierPool, streams: TokenStreams,
        send: Callable[[Command], None], config: DecodeConfig, transfer: TransferConfig,
    ) -> None:  # fmt: skip
        self._me = me
        self._layout = layout
        self._pool = pool
        self._carriers = carriers
        self._streams = streams
        self._send = send
        self._config = config
        self._transfer = transfer
        self.questions = Questions(send)
        self.copies = Copies(me.cohort, layout, pool, carriers, self.questions, send, transfer)
        self._arrivals: dict[Key, _Arrival] = {}
        self._stats = EngineStats()
        self.totals = TransferTotals()

    @property
    def num_pulls(self) -> int:
        return sum(arrival.committed is None for arrival in self._arrivals.values())

    async def reserve(self, offer: Offer) -> None:
        """Take an offer: returns when blocks are reserved and the pull has begun; of a moving sequence, when it has
        been adopted. Raises Overloaded if there is no room now, TransferFailed if the producer is of another cohort or
        offers the same again, or if the moving sequence could not be had."""
        check_cohort(offer.lease.worker_id, offer.lease.cohort, self._me.cohort)
        key = offer.lease.key
        if key in self._arrivals:
            raise TransferFailed(f"{key} has been offered before")
        if self.num_pulls >= self._config.max_pulls:
            raise Overloaded(f"{self.num_pulls} pulls are under way already", retry_after_s=1)
        arrival = self._arrivals[key] = _Arrival(offer, self._now(), [*offer.keys])
        try:
            reserved = await self._ask_engine(offer)
            if reserved.block_ids is None:
                raise Overloaded(f"no room: {reserved.reason}", retry_after_s=1)
            if self._arrivals.get(key) is not arrival:
                raise Overloaded("aborted meanwhile")
        except BaseException:
            self._arrivals.pop(key, None)
            self._send(Release(key))
            raise
        for one in arrival.keys:
            self._streams.register(one, offer.gateway_id, offer.service.tenant)
        pull = self._pull_moving if offer.moving else self._pull
        arrival.task = asyncio.get_running_loop().create_task(pull(arrival, reserved.block_ids, reserved.present))
        if offer.moving:
            await self._ended(arrival.task)

    async def take_loan(self, loan: Loan, is_worth: Callable[[int], bool] = lambda _num_missing: True) -> None:
        """Copy what another worker lends into the cache here. See Copies.take."""
        begun = self._now()

        def came(pulled: Pulled) -> None:
            self.totals = self.totals.with_pull(pulled, self._now() - begun)
            self._report()

        await self.copies.take(loan, came, is_worth)

    async def abort(self, key: Key) -> None:
        """End a request wherever it is; nothing writes to its blocks once they are given back."""
        self._streams.forget(key)
        named = self._arrivals.get(key)
        if named is not None and named.committed is None and key not in named.keys:
            return  # ended before; the blocks of the others are reserved under its name
        arrival = next((one for one in self._arrivals.values() if key in one.keys), None)
        if arrival is not None and arrival.committed is None:
            arrival.keys.remove(key)
            if arrival.keys:
                return  # others wait for the same blocks
            del self._arrivals[arrival.offer.lease.key]
            if arrival.task is not None and not arrival.task.done():
                arrival.task.cancel()
                await asyncio.wait([arrival.task], timeout=RELEASE_TIMEOUT_S)
            self._send(Abort(arrival.offer.lease.key))
            return
        self._arrivals.pop(key, None)
        self._send(Abort(key))

    def on_outputs(self, outputs: StepOutputs) -> tuple[TokenOutput, ...]:
        """Take a turn's news; returns the token outputs, with our stages on the first ones."""
        self._stats = outputs.stats
        self.questions.on_outputs(outputs)
        step_s = outputs.steps[-1].step_s if outputs.steps else 0.0
        return tuple(self._on_token(output, step_s) for output in outputs.tokens)

    async def beat(self) -> None:
        """One round of heartbeats for all open leases, grouped by producer."""
        by_producer: dict[tuple[str, str], list[Lease]] = {}
        for arrival in self._arrivals.values():
            lease = arrival.offer.lease
            if arrival.committed is None:
                by_producer.setdefault((lease.address, lease.incarnation), []).append(lease)
        for lease in self.copies.leases:
            by_producer.setdefault((lease.address, lease.incarnation), []).append(lease)
        await asyncio.gather(*map(self._renew, by_producer.values()))  # one that is silent delays no other

    # --- parts ---------------------------------------------------------------------------------------------

    async def _ask_engine(self, offer: Offer) -> Reserved:
        tpot_s = math.inf if offer.moving else offer.service.tpot_s
        command = Reserve(offer.lease.key, offer.num_tokens, offer.num_growth, len(offer.keys), offer.names, tpot_s)
        return await self.questions.reserve(command)

    async def _renew(self, leases: list[Lease]) -> None:
        try:
            async with asyncio.timeout(self._transfer.heartbeat_s):
                await self._carriers.carrier(leases[0]).renew(leases)
        except (SteelyardError, TimeoutError):
            return  # the next beat tries again; a producer that is gone ends the pull by itself

    async def _pull(self, arrival: _Arrival, block_ids: tuple[int, ...], present: Runs) -> None:
        lease = arrival.offer.lease
        try:
            await self._pull_and_adopt(arrival, block_ids, present)
        except LeaseLost as error:
            await asyncio.sleep(LOST_LEASE_GRACE_S)
            self._tell_gateway(arrival, error)
        except TransferFailed as error:
            self._tell_gateway(arrival, error)
        except Exception as error:  # whatever it was, the request hears of it
            log.exception("the pull of %s failed", lease.key)
            self._tell_gateway(arrival, TransferFailed(f"the pull failed: {error!r}"))
        await release(self._carriers, lease)

    async def _pull_moving(self, arrival: _Arrival, block_ids: tuple[int, ...], present: Runs) -> None:
        """Of a sequence that goes on where it was if this fails."""
        try:
            await self._pull_and_adopt(arrival, block_ids, present)
        except BaseException:
            for key in arrival.keys:
                self._streams.forget(key)
            raise

    async def _pull_and_adopt(self, arrival: _Arrival, block_ids: tuple[int, ...], present: Runs) -> None:
        """When it fails, the blocks go back."""
        lease = arrival.offer.lease
        try:
            carrier = self._carriers.carrier(lease)
            digests, siblings = self._transfer.digests, arrival.offer.siblings
            puller = Puller(self._layout, self._pool, block_ids, carrier, lease, digests, siblings, present)
            pulled = await puller.run(self._transfer.pull_timeout_s)
        except BaseException:
            self._give_back(lease.key)
            raise
        self._adopt(arrival, pulled)

    async def _ended(self, task: asyncio.Task[None]) -> None:
        """Raises what it raised, as its producer is to hear it."""
        try:
            await task
        except SteelyardError:
            raise
        except asyncio.CancelledError:
            me = asyncio.current_task()
            if me is not None and me.cancelling():  # it is the caller who does not want it any more
                raise
            raise TransferFailed("aborted meanwhile") from None

    def _adopt(self, arrival: _Arrival, pulled: Pulled) -> None:
        arrival.committed = self._now()
        if not arrival.offer.moving:  # of that the gateway measures the pause
            arrival.transfer = KvTransfer(
                pulled.carrier, pulled.size_bytes, pulled.hidden_bytes, pulled.transfer_s, pulled.exposed_s
            )
        self.totals = self.totals.with_pull(pulled, arrival.committed - arrival.begun)
        self._report()
        assert pulled.handoff is not None, "only loans come without"
        self._settle(arrival, pulled.handoff, pulled.exposed_s)

    def _report(self) -> None:
        """To the gateways, with the next batch of tokens."""
        fallbacks = self._carriers.num_fallbacks
        known = {one.carrier: one for one in self.totals.carriers}
        names = dict.fromkeys((*known, *fallbacks))
        totals = (replace(known.get(name, CarrierTotals(name)), num_fallbacks=fallbacks.get(name, 0)) for name in names)
        self._streams.transfers = TransferReport(tuple(totals), self._carriers.paths())

    def _settle(self, arrival: _Arrival, handoff: HandOff, waited_s: float) -> None:
        """Those answers go on here that the hand-off brings and that are still wanted. `waited_s`: since their first
        tokens."""
        lease_key = arrival.offer.lease.key
        del self._arrivals[lease_key]
        going = [request for request in (handoff.request, *handoff.siblings) if request.key in arrival.keys]
        for key in arrival.keys:  # the others have ended with their first token
            if key not in [request.key for request in going]:
                self._streams.forget(key)
        if not going:
            self._send(Release(lease_key))
            return
        self._arrivals |= {request.key: arrival for request in going}
        first, *siblings = going
        self._send(Adopt(first, handoff.computed, handoff.cached_tokens, tuple(siblings), lease_key, waited_s))

    def _give_back(self, key: Key) -> None:
        self.totals = replace(self.totals, num_failed=self.totals.num_failed + 1)
        self._report()
        self._arrivals.pop(key, None)
        self._send(Release(key))

    def _tell_gateway(self, arrival: _Arrival, error: SteelyardError) -> None:
        self._streams.fail(arrival.keys, ErrorInfo(error.code, error.message))

    def _on_token(self, output: TokenOutput, step_s: float) -> TokenOutput:
        """Of a transfer only what was waited for is a stage; of a sequence that moved the gateway knows the pause."""
        arrival = self._arrivals.pop(output.key, None) if output.token_ids or output.finish else None
        if arrival is None or arrival.committed is None or arrival.transfer is None:
            return output
        since_s = self._now() - arrival.committed
        step_s = min(step_s, since_s)
        stages = (("transfer", arrival.transfer.exposed_s), ("decode_wait", since_s - step_s), (STEPS, step_s))
        return replace(output, stages=stages, transfer=arrival.transfer)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
