"""Token streams: from one engine's outputs to one batched stream per gateway.

1. `register` says which gateway owns a key;
2. `publish` sorts a step's outputs by owner; each subscriber wakes once per step, however many tokens there are, and
   gets them in batches that fit a message;
3. a subscriber that hears nothing new gets an empty batch every `keepalive_s`, so that silence means death;
4. every gateway also gets the records of all steps, with whatever batch comes next; of a reader that falls behind the
   oldest are dropped;
5. and what the prefix cache has come to have and lost (engine/cache_feed.py), all of it when it subscribes; and, once,
   what the engine measured when it started;
6. while a gateway has no stream (it ended, or never came) its sequences go on for `orphan_s`, then they are aborted.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass, field

from engine.cache_feed import CacheFeed
from engine.step_shape import StepRecord
from engine.types import (
    NO_NEWS,
    NO_TRANSFERS,
    CacheNews,
    EngineStats,
    ErrorInfo,
    Key,
    TokenOutput,
    TransferReport,
)

KEEPALIVE_S = 1.0
MAX_BATCH_BYTES = 2**20  # about, on the wire; a single output may be larger
MAX_BATCH_STEPS = 256  # in one batch; more than most engines compute between two keep-alives


@dataclass(frozen=True, slots=True)
class StreamBatch:
    """One message of a token stream."""

    outputs: tuple[TokenOutput, ...]
    stats: EngineStats
    steps: tuple[StepRecord, ...] = ()  # since the batch before, oldest first
    transfers: TransferReport = NO_TRANSFERS
    cache: CacheNews = NO_NEWS
    calibration: tuple[StepRecord, ...] = ()  # once in a subscription


@dataclass(slots=True, eq=False)
class _Channel:
    """What one gateway has not read yet."""

    pending: list[TokenOutput] = field(default_factory=list)
    steps: deque[StepRecord] = field(default_factory=lambda: deque(maxlen=MAX_BATCH_STEPS))
    cache: CacheFeed = field(default_factory=CacheFeed)
    calibration: tuple[StepRecord, ...] = ()
    news: asyncio.Event = field(default_factory=asyncio.Event)
    generation: int = 0  # of its subscriptions; the newest one reads


class TokenStreams:
    """All gateways' streams of one engine."""

    def __init__(self, orphan_s: float, abort: Callable[[Key], None], keepalive_s: float = KEEPALIVE_S) -> None:
        self._orphan_s = orphan_s
        self._abort = abort
        self._keepalive_s = keepalive_s
        self._owners: dict[Key, str] = {}
        self._tenants: dict[Key, str] = {}
        self._channels: dict[str, _Channel] = {}
        self._stats = EngineStats()
        self.transfers = NO_TRANSFERS  # goes out with every batch
        self._cached: dict[int, None] = {}  # short names of all that the prefix cache has
        self._calibration: tuple[StepRecord, ...] = ()

    def register(self, key: Key, gateway_id: str, tenant: str = "") -> None:
        """`tenant`: for whom its tokens are computed."""
        self._owners[key] = gateway_id
        self._tenants[key] = tenant
        self._channel(gateway_id)

    def forget(self, key: Key) -> None:
        self._owners.pop(key, None)
        self._tenants.pop(key, None)

    def owner(self, key: Key) -> str | None:
        """The gateway of a key that has not ended."""
        return self._owners.get(key)

    def tenant(self, key: Key) -> str | None:
        """Of a key that has not ended."""
        return self._tenants.get(key)

    @property
    def num_keys(self) -> int:
        return len(self._owners)

    def publish(self, outputs: Iterable[TokenOutput], stats: EngineStats, steps: Sequence[StepRecord] = ()) -> None:
        """Queue outputs for their owners; outputs without an owner are dropped. A finished key is forgotten. `steps`
        are for everybody, and wake nobody."""
        self._stats = stats
        for channel in self._channels.values():
            channel.steps.extend(steps)
        for output in outputs:
            gateway_id = self._owners.get(output.key)
            if gateway_id is None:
                continue
            channel = self._channel(gateway_id)
            channel.pending.append(output)
            channel.news.set()
            if output.finish:
                self.forget(output.key)

    def fail(self, keys: Iterable[Key], error: ErrorInfo) -> None:
        """Tell the owners of these keys that they could not go on."""
        self.publish([TokenOutput.failed(key, error) for key in keys], self._stats)

    def publish_cache(self, news: CacheNews) -> None:
        """For everybody, at once: where the next request goes may depend on it."""
        if not (news.kept or news.lost):
            return
        self._cached |= dict.fromkeys(news.kept)
        for name in news.lost:
            self._cached.pop(name, None)
        for channel in self._channels.values():
            channel.cache.add(news, self._cached)
            channel.news.set()

    def publish_calibration(self, records: tuple[StepRecord, ...]) -> None:
        """For everybody who is there, and whoever comes."""
        self._calibration = records
        for channel in self._channels.values():
            channel.calibration = records
            channel.news.set()

    async def subscribe(self, gateway_id: str) -> AsyncGenerator[StreamBatch]:
        """Batches for this gateway until the subscriber leaves or subscribes anew."""
        channel = self._channel(gateway_id)
        channel.generation += 1
        generation = channel.generation
        channel.cache.renew(self._cached)
        channel.calibration = self._calibration
        if channel.cache or channel.calibration:
            channel.news.set()
        try:
            yield StreamBatch((), self._stats, transfers=self.transfers)
            while channel.generation == generation:
                await self._wait(channel.news)
                if channel.generation == generation:
                    yield self._take(channel)
        finally:
            if channel.generation == generation:
                self._expect_reader(gateway_id, channel)

    async def _wait(self, news: asyncio.Event) -> None:
        """For news; none for long is news too, for an empty batch tells the reader that we live."""
        timer = asyncio.get_running_loop().call_later(self._keepalive_s, news.set)
        try:
            await news.wait()
        finally:
            timer.cancel()

    def _take(self, channel: _Channel) -> StreamBatch:
        count = _num_fitting(channel.pending)
        outputs, channel.pending = tuple(channel.pending[:count]), channel.pending[count:]
        steps = tuple(channel.steps)
        channel.steps.clear()
        cache = channel.cache.take()
        calibration, channel.calibration = channel.calibration, ()
        if not channel.pending and not channel.cache:
            channel.news.clear()
        return StreamBatch(outputs, self._stats, steps, self.transfers, cache, calibration)

    def _channel(self, gateway_id: str) -> _Channel:
        channel = self._channels.get(gateway_id)
        if channel is None:
            channel = self._channels[gateway_id] = _Channel()
            self._expect_reader(gateway_id, channel)
        return channel

    def _expect_reader(self, gateway_id: str, channel: _Channel) -> None:
        """Somebody must subscribe within `orphan_s`."""
        loop = asyncio.get_running_loop()
        loop.call_later(self._orphan_s, self._orphan, gateway_id, channel, channel.generation)

    def _orphan(self, gateway_id: str, channel: _Channel, generation: int) -> None:
        """Nobody came for this gateway's sequences, unless there is a newer subscription."""
        if channel.generation != generation or self._channels.get(gateway_id) is not channel:
            return
        for key in [key for key, owner in self._owners.items() if owner == gateway_id]:
            self._abort(key)
            self.forget(key)
        del self._channels[gateway_id]


def _num_fitting(outputs: Sequence[TokenOutput]) -> int:
    """How many of the first ones make a batch: at least one, where there is one."""
    size_bytes = 0
    for count, output in enumerate(outputs):
        size_bytes += _size_bytes(output)
        if size_bytes > MAX_BATCH_BYTES and count:
            return count
    return len(outputs)


def _size_bytes(output: TokenOutput) -> int:
    """About what it takes on the wire: 16 bytes for a likely token, and as much for what each belongs to."""
    likely = sum(1 + len(one.top) for logprobs in (output.logprobs, output.prompt_logprobs) for one in logprobs)
    return 128 + len(output.embedding) + 8 * len(output.token_ids) + 16 * likely
