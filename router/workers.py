"""Links to workers: one per member, which reads its token stream and knows whether it lives.

A link connects, reads batches, and reconnects with a growing pause while the member stays listed. A stream that
ends, or is silent for longer than SILENCE_S (workers send at least a batch a second), is down: its owner is told
once, before the link tries again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import ClassVar, Protocol

from engine.errors import SteelyardError
from engine.streams import StreamBatch
from engine.types import NO_TRANSFERS, EngineStats, Key, Move, Submission
from router.membership import Member

SILENCE_S = 5.0
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 2.0

log = logging.getLogger(__name__)


class WorkerClient(Protocol):
    """Calls to one life of one worker. Errors are SteelyardError."""

    stats_stand: ClassVar[bool]  # does a report stand until the next one?

    async def submit(self, submission: Submission, role_epoch: int, timeout_s: float) -> None: ...

    async def abort(self, key: Key, timeout_s: float) -> None: ...

    async def move(self, move: Move, timeout_s: float) -> None:
        """Returns when it is done; after TransferFailed or Overloaded nothing has changed."""
        ...

    def tokens(self, gateway_id: str) -> AsyncGenerator[StreamBatch]: ...

    def stats_by_now(self, told: EngineStats) -> EngineStats:
        """What the worker's last report says now: the same, or what a model knows better."""
        ...

    async def close(self) -> None: ...


class Connector(Protocol):
    """Makes clients; gRPC in a cluster, modelled links in the simulator."""

    def connect(self, member: Member) -> WorkerClient: ...


class WorkerLink:
    """One member, as this gateway sees it."""

    def __init__(
        self, member: Member, client: WorkerClient, gateway_id: str,
        on_batch: Callable[[Member, StreamBatch], None], on_down: Callable[[Member, str], None],
    ) -> None:  # fmt: skip
        self.member = member
        self.client = client
        self.connected = False
        self.stats_stand = client.stats_stand
        self._told = EngineStats()
        self.transfers = NO_TRANSFERS  # as told last
        self._gateway_id = gateway_id
        self._on_batch = on_batch
        self._on_down = on_down
        self._task = asyncio.get_running_loop().create_task(self._run())

    @property
    def takes_requests(self) -> bool:
        return self.connected and not self.member.is_leaving

    @property
    def stats(self) -> EngineStats:
        """The worker's load as far as it is known here."""
        return self.client.stats_by_now(self._told)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._set_down("it left the membership")
        await self.client.close()

    async def _run(self) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            reason = await self._read()
            pause_s = FIRST_PAUSE_S if self.connected else min(2 * pause_s, LONGEST_PAUSE_S)
            self._set_down(reason)
            await asyncio.sleep(pause_s)

    async def _read(self) -> str:
        """Read batches until the stream breaks; returns why it did."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(SILENCE_S) as patience, aclosing(self.client.tokens(self._gateway_id)) as stream:
                async for batch in stream:
                    patience.reschedule(loop.time() + SILENCE_S)
                    self.connected = True
                    self._told = batch.stats
                    self.transfers = batch.transfers
                    self._on_batch(self.member, batch)
            return "its token stream ended"
        except TimeoutError:
            return f"it was silent for {SILENCE_S:g} s"
        except SteelyardError as error:
            return error.message
        except Exception as error:  # a link that died in silence would look like a worker that never answers
            log.exception("reading the tokens of worker %s failed", self.member.worker_id)
            return repr(error)

    def _set_down(self, reason: str) -> None:
        if self.connected:
            self.connected = False
            log.warning("worker %s (%s) is down: %s", self.member.worker_id, self.member.incarnation, reason)
            self._on_down(self.member, reason)
