"""The choice of a carrier, for each pair of workers: measured at first contact, fastest first, with a way back.

1. at the first lease of a producer's life its paths are measured with the sample: grpc always, shm where the producer's
   pool can be mapped, dist over a link between two porters where the configuration wants it. What is too slow
   (`min_gb_per_s`), or fails, is not used; the log says which and why;
2. a pull takes the fastest. What fails is tried once more, then the next one goes on at the frame that is missing, and
   the log and the totals say so; the failed one is left alone until the pair is measured anew. Only dist comes back by
   itself, with new porters: AGAIN_S later it is measured beside the next pull;
3. a pair that was idle for IDLE_S, or whose producer has begun a new life, is forgotten, and what was mapped or linked
   is let go of.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import grpc

from engine.errors import LeaseLost, TransferFailed
from engine.planes import CacheLayout
from engine.runs import Runs
from engine.types import KvPath
from kv_transfer.carriers.distributed.carrier import DistCarrier, DistLink
from kv_transfer.carriers.distributed.porters import Porters
from kv_transfer.carriers.door import OpenPool, open_pool
from kv_transfer.carriers.grpc import Channels, GrpcCarrier, probe
from kv_transfer.carriers.shm import ShmCarrier, copy_rate
from kv_transfer.config import TransferConfig
from kv_transfer.frames import Message
from kv_transfer.lease import Lease

IDLE_S = 60.0
AGAIN_S = 5.0  # after dist has failed
TRIES = 2  # of one carrier, in one pull
GB = 1e9

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Pair:
    """What is known of the paths to one life of one producer. `rates`: bytes per second of those that may be used."""

    worker_id: str
    rates: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # why
    digest: int = 0  # of the producer's sample
    opened: OpenPool | None = None
    link: DistLink | None = None
    linking: asyncio.Task[None] | None = None
    link_again_at: float | None = None
    num_pulls: int = 0  # under way
    used_at: float = 0.0

    @property
    def fastest_first(self) -> list[str]:
        return sorted(self.rates, key=lambda name: self.rates[name], reverse=True)

    @property
    def is_cut_off(self) -> bool:
        """Its only carrier was a link that is over."""
        return self.link is not None and self.link.is_over and self.fastest_first == [DistCarrier.name]

    def refuse(self, name: str, reason: str) -> None:
        self.rates.pop(name, None)
        self.refused[name] = reason

    def close(self) -> None:
        if self.opened is not None:
            self.opened.close()
            self.opened = None
        if self.linking is not None:
            self.linking.cancel()
        if self.link is not None:
            self.link.close()
            self.link = None


class ChosenCarriers:
    """Implements kv_transfer.carrier.CarrierPool."""

    def __init__(
        self,
        channels: Channels,
        layout: CacheLayout,
        token: str,
        config: TransferConfig,
        porters: Porters | None = None,
    ) -> None:
        self.channels = channels
        self._porters = porters
        self._layout = layout
        self._token = token
        self._config = config
        self._pairs: dict[tuple[str, str], asyncio.Task[Pair]] = {}
        self.num_fallbacks: dict[str, int] = {}  # away from each carrier

    def carrier(self, lease: Lease) -> ChosenCarrier:
        return ChosenCarrier(self, lease)

    async def pair(self, lease: Lease) -> Pair:
        """Measured once in a pair's life. Raises TransferFailed if no carrier may be used, LeaseLost if that life of
        the producer is over."""
        self._forget(lease)
        name = (lease.address, lease.incarnation)
        task = self._pairs.get(name)
        if task is None:
            task = self._pairs[name] = asyncio.get_running_loop().create_task(self._measured(lease))
        await asyncio.wait([task])
        if not (_has_result(task) and task.result().rates) and self._pairs.get(name) is task:
            del self._pairs[name]  # the next one measures anew
        pair = task.result()
        if not pair.rates:
            pair.close()
            reasons = "; ".join(f"{name}: {reason}" for name, reason in pair.refused.items())
            raise TransferFailed(f"no carrier from {lease.worker_id}: {reasons}")
        self._link_again(pair, lease)
        return pair

    def paths(self) -> tuple[KvPath, ...]:
        """What was measured, of the pairs that are known now."""
        pairs = [task.result() for task in self._pairs.values() if _has_result(task)]
        return tuple(KvPath(pair.worker_id, name, rate) for pair in pairs for name, rate in pair.rates.items())

    def count_fallback(self, pair: Pair, name: str, reason: str) -> None:
        log.warning("KV from %s comes by another carrier: %s failed: %s", pair.worker_id, name, reason)
        pair.refuse(name, f"it failed: {reason}")
        self.num_fallbacks[name] = self.num_fallbacks.get(name, 0) + 1
        if name == DistCarrier.name:
            pair.link_again_at = asyncio.get_running_loop().time() + AGAIN_S

    async def close(self) -> None:
        for task in self._pairs.values():
            task.cancel()
        for outcome in await asyncio.gather(*self._pairs.values(), return_exceptions=True):
            if isinstance(outcome, Pair):
                outcome.close()
        self._pairs.clear()

    def _forget(self, lease: Lease) -> None:
        """Those that are idle or cut off, and earlier lives of this producer, whose memory would else be kept from the
        system."""
        now = asyncio.get_running_loop().time()
        for name, task in list(self._pairs.items()):
            if not _has_result(task) or task.result().num_pulls:
                continue
            pair = task.result()
            is_over = pair.worker_id == lease.worker_id and name != (lease.address, lease.incarnation)
            if is_over or pair.is_cut_off or now - pair.used_at > IDLE_S:
                del self._pairs[name]
                pair.close()

    # --- measuring -----------------------------------------------------------------------------------------

    async def _measured(self, lease: Lease) -> Pair:
        pair, wanted = Pair(lease.worker_id, used_at=asyncio.get_running_loop().time()), self._config.carriers
        try:
            pair.digest, rate = await probe(self.channels(lease.address, lease.incarnation))
        except LeaseLost:
            raise
        except TransferFailed as error:
            pair.refuse("grpc", error.message)
            return pair
        self._take(pair, "grpc", rate, "grpc" in wanted)
        if "shm" in wanted:
            await self._measure_shm(pair, lease, pair.digest)
        if "dist" in wanted:
            await self._measure_dist(pair, lease)
        rates = ", ".join(f"{name} {pair.rates[name] / GB:.2f} GB/s" for name in pair.fastest_first)
        refused = "".join(f"; not {name}: {reason}" for name, reason in pair.refused.items())
        log.info("KV from %s (%s): %s%s", lease.worker_id, lease.address, rates or "no carrier", refused)
        return pair

    async def _measure_shm(self, pair: Pair, lease: Lease, digest: int) -> None:
        try:
            pair.opened = await open_pool(self._layout, self._token, lease.incarnation)
            self._take(pair, "shm", copy_rate(pair.opened, digest), True)
        except TransferFailed as error:
            pair.refuse("shm", error.message)

    async def _measure_dist(self, pair: Pair, lease: Lease) -> None:
        try:
            if self._porters is None:
                raise TransferFailed("this worker has no porter")
            channel = self.channels(lease.address, lease.incarnation)
            pair.link = await DistLink.open(channel, self._porters)
            self._take(pair, "dist", await pair.link.rate(pair.digest), True)
        except TransferFailed as error:
            pair.refuse("dist", error.message)
            pair.link_again_at = asyncio.get_running_loop().time() + AGAIN_S

    def _link_again(self, pair: Pair, lease: Lease) -> None:
        """Beside the pulls, which go by others meanwhile."""
        now = asyncio.get_running_loop().time()
        if pair.link_again_at is not None and pair.link_again_at <= now:
            pair.link_again_at = None
            pair.linking = asyncio.get_running_loop().create_task(self._measure_dist_again(pair, lease))

    async def _measure_dist_again(self, pair: Pair, lease: Lease) -> None:
        if pair.link is not None:
            pair.link.close()
        await self._measure_dist(pair, lease)
        if "dist" in pair.rates:
            pair.refused.pop("dist", None)
            log.info("KV from %s can come by dist again: %.2f GB/s", pair.worker_id, pair.rates["dist"] / GB)

    def _take(self, pair: Pair, name: str, rate: float, is_wanted: bool) -> None:
        floor = self._config.min_gb_per_s * GB
        if not is_wanted:
            pair.refuse(name, "the configuration excludes it")
        elif rate < floor:
            pair.refuse(name, f"{rate / GB:.2f} GB/s is below kv_transfer.min_gb_per_s ({floor / GB:g})")
        else:
            pair.rates[name] = rate


class ChosenCarrier:
    """Implements kv_transfer.carrier.Carrier for one pull."""

    def __init__(self, carriers: ChosenCarriers, lease: Lease) -> None:
        self._carriers = carriers
        self._to = lease
        self._base = GrpcCarrier(self._channel())
        self.name = ""  # of what carried last
        self._num_tries = 0  # of it
        self._failure = "what came was not what was sent"  # unless it is known better

    async def pull(self, lease: Lease, first_frame: int, present: Runs = ()) -> AsyncGenerator[Message]:
        pair = await self._carriers.pair(lease)
        carrier = self._next(pair)
        pair.num_pulls += 1
        try:
            async with aclosing(carrier.pull(lease, first_frame, present)) as messages:
                async for message in messages:
                    yield message
        except TransferFailed as error:
            self._failure = error.message
            raise
        finally:
            pair.num_pulls -= 1
            pair.used_at = asyncio.get_running_loop().time()

    async def release(self, lease: Lease) -> None:
        await self._base.release(lease)

    async def renew(self, leases: Sequence[Lease]) -> None:
        await self._base.renew(leases)

    def _next(self, pair: Pair) -> GrpcCarrier:
        """The fastest; after it was tried TRIES times, the next."""
        if self._num_tries >= TRIES and self.name in pair.rates and len(pair.rates) > 1:
            self._carriers.count_fallback(pair, self.name, self._failure)
        name = pair.fastest_first[0]
        self._num_tries = self._num_tries + 1 if name == self.name else 1
        self.name = name
        if name == ShmCarrier.name and pair.opened is not None:
            return ShmCarrier(self._channel(), pair.opened.pool)
        if name == DistCarrier.name and pair.link is not None:
            return DistCarrier(self._channel(), pair.link)
        return self._base

    def _channel(self) -> grpc.aio.Channel:
        return self._carriers.channels(self._to.address, self._to.incarnation)


def _has_result(task: asyncio.Task[Pair]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None
