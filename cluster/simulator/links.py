"""Modelled links: what gateways, prefill sides and intakes call instead of gRPC. At the other end are the real sides.

Each class implements one Protocol of the part that uses it, by calls on the modelled network.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any

from cluster.sides import WorkerSides
from cluster.simulator.network import CALL_BYTES, Network, Port
from engine.errors import SteelyardError
from engine.streams import StreamBatch
from engine.types import Endpoint, Key, Submission
from kv_transfer.carrier import as_transfer_error
from kv_transfer.frames import HEADER_BYTES, Frame, Message
from kv_transfer.lease import Lease, Offer
from router.membership import Member

OUTPUT_BYTES = 32  # of one token output beside its ids
STEP_BYTES = 24  # of the record of a step
CALL_TIMEOUT_S = 2.0  # of a release or a renewal
TOKEN_BYTES = 4

WorkerPort = Port[WorkerSides]
WorkerNetwork = Network[WorkerSides]


class SimulatedClient:
    """Implements router.workers.WorkerClient."""

    def __init__(self, network: WorkerNetwork, gateway: WorkerPort, member: Member) -> None:
        self._network = network
        self._gateway = gateway
        self._member = member

    async def submit(self, submission: Submission, role_epoch: int, timeout_s: float) -> None:
        async def work(sides: WorkerSides) -> None:
            sides.submit(submission, role_epoch)

        size_bytes = CALL_BYTES + TOKEN_BYTES * submission.request.num_tokens
        to = self._member
        await self._network.call(self._gateway, to.address, to.incarnation, "submit", work, timeout_s, size_bytes)

    async def abort(self, key: Key, timeout_s: float) -> None:
        to = self._member
        await self._network.call(
            self._gateway, to.address, to.incarnation, "abort", lambda sides: sides.abort(key), timeout_s
        )

    def tokens(self, gateway_id: str) -> AsyncGenerator[StreamBatch]:
        to = self._member
        return self._network.stream(
            self._gateway, to.address, to.incarnation, "subscribe",
            lambda sides: sides.subscribe(gateway_id), batch_bytes,
        )  # fmt: skip

    async def close(self) -> None:
        """Streams end with their readers."""


class SimulatedConnector:
    """Implements router.workers.Connector for one gateway."""

    def __init__(self, network: WorkerNetwork, gateway: WorkerPort) -> None:
        self._network = network
        self._gateway = gateway

    def connect(self, member: Member) -> SimulatedClient:
        return SimulatedClient(self._network, self._gateway, member)


class SimulatedPeers:
    """Implements prefill_worker.side.DecodePeers for one worker."""

    def __init__(self, network: WorkerNetwork, worker: WorkerPort) -> None:
        self._network = network
        self._worker = worker

    async def offer(self, target: Endpoint, offer: Offer, timeout_s: float) -> None:
        await self._network.call(
            self._worker, target.address, target.incarnation, "offer", lambda sides: sides.take_offer(offer), timeout_s
        )


class SimulatedCarriers:
    """Implements kv_transfer.carrier.CarrierPool for one worker. `bytes_scale`: bytes of the modelled model's KV for
    each byte that really moves."""

    def __init__(self, network: WorkerNetwork, worker: WorkerPort, bytes_scale: float) -> None:
        self._network = network
        self._worker = worker
        self._bytes_scale = bytes_scale

    def carrier(self, lease: Lease) -> SimulatedCarrier:
        return SimulatedCarrier(self._network, self._worker, self._bytes_scale, lease)


class SimulatedCarrier:
    """Implements kv_transfer.carrier.Carrier: a link to the producer that granted `to`."""

    def __init__(self, network: WorkerNetwork, worker: WorkerPort, bytes_scale: float, to: Lease) -> None:
        self._network = network
        self._worker = worker
        self._bytes_scale = bytes_scale
        self._to = to

    async def pull(self, lease: Lease, first_frame: int) -> AsyncGenerator[Message]:
        messages = self._network.stream(
            self._worker, self._to.address, self._to.incarnation, "pull",
            lambda sides: sides.outbox.messages(lease, first_frame), self._message_bytes,
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
        if isinstance(message, Frame):
            return HEADER_BYTES + round(self._bytes_scale * len(message.payload))
        return HEADER_BYTES + len(message.handoff)


def batch_bytes(batch: StreamBatch) -> int:
    num_tokens = sum(len(output.token_ids) for output in batch.outputs)
    return CALL_BYTES + OUTPUT_BYTES * len(batch.outputs) + TOKEN_BYTES * num_tokens + STEP_BYTES * len(batch.steps)
