"""Porters: the porter that a worker has now, and the next one when it has ended."""

from __future__ import annotations

import asyncio
import logging

from engine.errors import TransferFailed
from engine.pool import BlockBytes, SharedPool
from engine.rank_pools import RankPools
from kv_transfer.carriers.distributed.process import PorterProcess
from kv_transfer.carriers.distributed.records import PorterSetup
from kv_transfer.carriers.sample import Sample

log = logging.getLogger(__name__)


class Porters:
    """One at a time, from `begin` to `stop`."""

    def __init__(self, setup: PorterSetup, pool: BlockBytes, sample: Sample) -> None:
        self.setup = setup
        self.is_mapped = isinstance(pool, SharedPool | RankPools)
        self.sample_bytes = len(sample.memory)
        self._pool = pool
        self._sample = sample
        self._starting: asyncio.Task[PorterProcess] | None = None
        self._is_stopped = False

    def begin(self) -> None:
        """Start one, while nobody needs it yet."""
        start = PorterProcess.start(self.setup, self._pool, self._sample.fd, self._on_end)
        self._starting = asyncio.get_running_loop().create_task(start)
        self._starting.add_done_callback(_log_failure)

    async def ready(self) -> PorterProcess:
        """The present one, once it is ready; what did not start is started anew. Raises TransferFailed."""
        task = self._starting
        if self._is_stopped:
            raise TransferFailed("the porters were stopped")
        if task is None or (task.done() and (task.exception() is not None or task.result().has_ended)):
            self.begin()
        assert self._starting is not None
        return await asyncio.shield(self._starting)

    def present(self) -> PorterProcess:
        """Raises TransferFailed if none is ready."""
        task = self._starting
        if task is None or not task.done() or task.exception() is not None:
            raise TransferFailed("the porter is not ready")
        return task.result()

    async def stop(self) -> None:
        task, self._starting, self._is_stopped = self._starting, None, True
        if task is None:
            return
        task.cancel()
        for outcome in await asyncio.gather(task, return_exceptions=True):
            if isinstance(outcome, PorterProcess):
                await outcome.stop()

    def _on_end(self, reason: str) -> None:
        log.warning("%s; another one is started", reason)
        self.begin()


def _log_failure(starting: asyncio.Task[PorterProcess]) -> None:
    if not starting.cancelled() and (error := starting.exception()) is not None:
        log.warning("KV cannot go by dist: %s", error)
