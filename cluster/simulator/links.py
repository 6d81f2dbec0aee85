"""Modelled links: what gateways, prefill sides and intakes call instead of gRPC. At the other end are the real sides.

Each class implements one Protocol of the part that uses it, by calls on the modelled network.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, ClassVar, Protocol

from cluster.sides import WorkerSides
from cluster.simulator.burst import TimedOutput
from cluster.simulator.clock import virtual_loop
from cluster.simulator.network import CALL_BYTES, Network, Port
from engine.errors import SteelyardError
from engine.runs import Runs
from engine.streams import StreamBatch
from engine.types import Endpoint, EngineStats, Key, KvPath, Move, Submission, TokenOutput
from kv_transfer.carrier import as_transfer_error
from kv_transfer.frames import HEADER_BYTES, Commit, Frame, Message
from kv_transfer.lease import Lease, Loan, Offer
from router.membership import Member

OUTPUT_BYTES = 32  # of one token output beside its ids
CALL_TIMEOUT_S = 2.0  # of a release or a renewal
TOKEN_BYTES = 4
NAME_BYTES = 8  # of a cached block

WorkerPort = Port[WorkerSides]
WorkerNetwork = Network[WorkerSides]


class StepsAhead(Protocol):
    """Of a worker whose steps are advanced together: what single ones would have let out by now."""

    def stats_by(self, told: EngineStats, now: float) -> EngineStats:
        """What was reported by a time, for someone who last heard `told`."""
        ...

    def catch_up(self) -> bool:
        """Let out what has been made by now; False if there is nothing."""
        ...


class SimulatedClient:
    """Implements router.workers.WorkerClient."""

    stats_stand: ClassVar[bool] = False

    def __init__(
        self, network: WorkerNetwork, gateway: WorkerPort, worker: WorkerPort, member: Member, steps: StepsAhead
    ) -> None:
        self._network = network
        self._gateway = gateway
        self._worker = worker
        self._member = member
        self._steps = steps

    async def submit(self, submission: Submission, role_epoch: int, timeout_s: float) -> None:
        async def work(sides: WorkerSides) -> None:
            sides.submit(submission, role_epoch)

        size_bytes = CALL_BYTES + TOKEN_BYTES * submission.request.num_tokens
        to = self._member
        await self._network.call(self._gateway, to.address, to.incarnation, "submit", work, timeout_s, size_bytes)

    async def abort(self, key: Key, timeout_s: float) -> None:
        async def work(sides: WorkerSides) -> None:
            if self._steps.catch_up():  # afterwards these tokens are nobody's
                await virtual_loop().quiet()
            await sides.abort(key)

        to = self._member
        await self._network.call(self._gateway, to.address, to.incarnation, "abort", work, timeout_s)

    async def move(self, move: Move, timeout_s: float) -> None:
        to = self._member
        await self._network.call(
            self._gateway, to.address, to.incarnation, "move", lambda sides: sides.move(move), timeout_s
        )

    async def tokens(self, gateway_id: str) -> AsyncGenerator[StreamBatch]:
        to = self._member
        batches = self._network.stream(
            self._gateway, to.address, to.incarnation, "subscribe",
            lambda sides: sides.subscribe(gateway_id), batch_bytes, sent_at=sent_at,
        )  # fmt: skip
        async with aclosing(batches):
            async for batch in batches:
                latency_s = self._network.latency_s(self._worker, self._gateway)
                outputs = tuple([_arrived(output, latency_s) for output in batch.outputs])
                yield replace(batch, outputs=outputs)

    def stats_by_now(self, told: EngineStats) -> EngineStats:
        latency_s = self._network.latency_s(self._worker, self._gateway)
        stats = self._steps.stats_by(told, asyncio.get_running_loop().time() - latency_s)
        if stats is told or not told.num_queued_tokens:
            return stats
        return replace(stats, num_queued_tokens=told.num_queued_tokens, queued_s=told.queued_s)  # no step changes it

    async def close(self) -> None:
        """Streams end with their readers."""


class SimulatedConnector:
    """Implements router.workers.Connector for one gateway. `worker_of` knows the ports and the steps of workers."""

    def __init__(
        self, network: WorkerNetwork, gateway: WorkerPort, worker_of: Callable[[Member], tuple[WorkerPort, StepsAhead]]
    ) -> None:
        self._network = network
        self._gateway = gateway
        self._worker_of = worker_of

    def connect(self, member: Member) -> SimulatedClient:
        port, steps = self._worker_of(member)
        return SimulatedClient(self._network, self._gateway, port, member, steps)


class SimulatedPeers:
    """Implements prefill_worker.side.DecodePeers and decode_worker.mover.MovePeers for one worker."""

    def __init__(self, network: WorkerNetwork, worker: WorkerPort) -> None:
        self._network = network
        self._worker = worker

    async def offer(self, target: Endpoint, offer: Offer, timeout_s: float) -> None:
        await self._network.call(
            self._worker, target.address, target.incarnation, "offer", lambda sides: sides.take_offer(offer), timeout_s
        )

    async def copy(self, target: Endpoint, loan: Loan, timeout_s: float) -> None:
        size_bytes = CALL_BYTES + sum(map(len, loan.names))
        await self._network.call(
            self._worker, target.address, target.incarnation, "copy", lambda sides: sides.copy(loan), timeout_s,
            size_bytes,
        )  # fmt: skip

    async def borrow(self, source: Endpoint, names: tuple[bytes, ...], timeout_s: float) -> Loan | None:
        loans: list[Loan | None] = []

        async def work(sides: WorkerSides) -> None:
            loans.append(await sides.borrow(names))

        size_bytes = CALL_BYTES + sum(map(len, names))
        await self._network.call(
            self._worker, source.address, source.incarnation, "borrow", work, timeout_s, size_bytes
        )
        return loans[0]


class SimulatedCarriers:
    """Implements kv_transfer.carrier.CarrierPool for one worker. `bytes_scale`: bytes of the modelled model's KV for
    each byte that really moves."""

    def __init__(self, network: WorkerNetwork, worker: WorkerPort, bytes_scale: float) -> None:
        self._network = network
        self._worker = worker
        self._bytes_scale = bytes_scale
        self.num_fallbacks: dict[str, int] = {}

    def carrier(self, lease: Lease) -> SimulatedCarrier:
        return SimulatedCarrier(self._network, self._worker, self._bytes_scale, lease)

    def paths(self) -> tuple[KvPath, ...]:
        return ()


class SimulatedCarrier:
    """Implements kv_transfer.carrier.Carrier: a link to the producer that granted `to`."""

    name = "simulated"

    def __init__(self, network: WorkerNetwork, worker: WorkerPort, bytes_scale: float, to: Lease) -> None:
        self._network = network
        self._worker = worker
        self._bytes_scale = bytes_scale
        self._to = to

    async def pull(self, lease: Lease, first_frame: int, present: Runs = ()) -> AsyncGenerator[Message]:
        messages = self._network.stream(
            self._worker, self._to.address, self._to.incarnation, "pull",
            lambda sides: sides.outbox.messages(lease, first_frame, present), self._message_bytes,
        )  # fmt: skip
        try:
            async for message in messages:
                yield message
        except SteelyardError as error:
            raise as_transfer_error(error) from None
        finally:
            await messages.aclose()

    async def release(self, lease: Lease) -> None:
        async def work(sides: WorkerSides) -> None:
            sides.outbox.release(lease)

        await self._small_call("release", work)

    async def renew(self, leases: Sequence[Lease]) -> None:
        async def work(sides: WorkerSides) -> None:
            sides.outbox.renew(leases)

        await self._small_call("renew", work)

    async def _small_call(self, what: str, work: Callable[[WorkerSides], Coroutine[Any, Any, None]]) -> None:
        to = self._to
        try:
            await self._network.call(self._worker, to.address, to.incarnation, what, work, CALL_TIMEOUT_S)
        except SteelyardError as error:
            raise as_transfer_error(error) from None

    def _message_bytes(self, message: Message) -> int:
        if isinstance(message, Commit):
            return HEADER_BYTES + len(message.handoff)
        assert isinstance(message, Frame), "simulated workers share no memory"
        return HEADER_BYTES + round(self._bytes_scale * len(message.payload))


def batch_bytes(batch: StreamBatch) -> int:
    """Of the message; where it stands for those of several steps, of one of these."""
    num_tokens = sum(1 if isinstance(output, TimedOutput) else len(output.token_ids) for output in batch.outputs)
    num_names = len(batch.cache.kept) + len(batch.cache.lost)
    return CALL_BYTES + OUTPUT_BYTES * len(batch.outputs) + TOKEN_BYTES * num_tokens + NAME_BYTES * num_names


def sent_at(batch: StreamBatch) -> float | None:
    """When the last of several steps' messages was sent; None of a single one, which is sent now."""
    return max((output.times[-1] for output in batch.outputs if isinstance(output, TimedOutput)), default=None)


def times_of(output: TokenOutput, now: float, before: float) -> list[float]:
    """When each token of an output came to the gateway, which reads it now; the token before them came at `before`."""
    times = output.times if isinstance(output, TimedOutput) else ()
    num_single = len(output.token_ids) - len(times)
    if num_single:  # these came before, and what came after has waited for them
        return [now] * num_single + [max(now, time) for time in times]
    return list(times) if times and times[0] >= before else [max(before, time) for time in times]


def _arrived(output: TokenOutput, latency_s: float) -> TokenOutput:
    if isinstance(output, TimedOutput):  # made for this stream, and never sent again
        output.times = tuple([time + latency_s for time in output.times])
    return output
