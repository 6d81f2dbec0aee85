"""Bugs planted on purpose, to see that fault runs find them. Each is a mistake that a reviewer could overlook.

A bug is a context manager; within it the real class makes the mistake. `PLANTED` has them by name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from decode_worker.intake import Intake, _Arrival
from engine.block_manager import BlockManager, Holder
from engine.engine import Engine
from engine.errors import Overloaded, TransferFailed
from engine.streams import StreamBatch
from engine.types import Key, Progress, Release, StepOutputs, TokenOutput
from kv_transfer.frames import Frame
from kv_transfer.lease import Offer
from prefill_worker.outbox import Outbox
from prefill_worker.side import PrefillSide
from router.dispatch import Dispatcher
from router.live import LiveRequest
from router.membership import Member


@contextmanager
def _planted(owner: type, name: str, mistake: Callable[..., Any]) -> Iterator[None]:
    right = getattr(owner, name)
    setattr(owner, name, mistake)
    try:
        yield
    finally:
        setattr(owner, name, right)


@contextmanager
def skipped_epoch_fence() -> Iterator[None]:
    """The gateway takes tokens of earlier placements."""
    take = LiveRequest.take

    def take_any(live: LiveRequest, output: TokenOutput, worker_id: str) -> bool:
        present = live.epoch
        live.epoch = output.key.epoch
        try:
            return take(live, output, worker_id)
        finally:
            live.epoch = present

    def on_batch(dispatcher: Dispatcher, member: Member, batch: StreamBatch) -> None:
        dispatcher._news.set()
        for output in batch.outputs:
            live = dispatcher._live.get(output.key.request_id)
            if live is not None and live.take(output, member.worker_id) and live.handed_off:
                dispatcher.canary.prove()

    with _planted(LiveRequest, "take", take_any), _planted(Dispatcher, "_on_batch", on_batch):
        yield


def double_free() -> AbstractContextManager[None]:
    """A block goes back as soon as one of its holders lets go."""

    def free(blocks: BlockManager, holder: Holder, block_ids: list[int]) -> None:
        for block_id in reversed(block_ids):
            blocks._holders[block_id].remove(holder)
            if blocks._hash_of[block_id] is None:
                blocks._free.append(block_id)
            else:
                blocks._cached[block_id] = None

    return _planted(BlockManager, "free", free)


def lost_release() -> AbstractContextManager[None]:
    """A pull that failed keeps its reservation."""

    def give_back(intake: Intake, key: Key) -> None:
        intake._arrivals.pop(key, None)

    return _planted(Intake, "_give_back", give_back)


def reordered_token() -> AbstractContextManager[None]:
    """Tokens that overtake the first one are not held back."""

    def hold(live: LiveRequest, output: TokenOutput) -> None:
        live._deliver(output, "")

    return _planted(LiveRequest, "_hold", hold)


def ignored_deadline() -> AbstractContextManager[None]:
    """The deadline is looked at only when something comes."""

    async def next_event(dispatcher: Dispatcher, live: LiveRequest) -> TokenOutput | None:
        if live.placement is None and live.leader is None:
            await dispatcher._place(live)
        event = await live.next_event()
        if isinstance(event, TokenOutput):
            return event
        await dispatcher._place_again(live, event)
        return None

    return _planted(Dispatcher, "_next_event", next_event)


@contextmanager
def leaked_reservation() -> Iterator[None]:
    """What the engine reserves for an offer whose producer has gone meanwhile is given back by nobody."""

    async def reserve(intake: Intake, offer: Offer) -> None:
        key = offer.lease.key
        if key in intake._arrivals:
            raise TransferFailed(f"{key} has been offered before")
        if intake.num_pulls >= intake._config.max_pulls:
            raise Overloaded("pulls are under way already")
        arrival = intake._arrivals[key] = _Arrival(offer, intake._now(), [*offer.keys])
        try:
            reserved = await intake._ask_engine(offer)
            if reserved.block_ids is None or intake._arrivals.get(key) is not arrival:
                raise Overloaded("no room, or aborted meanwhile")
        except BaseException:
            intake._arrivals.pop(key, None)
            raise
        for one in arrival.keys:
            intake._streams.register(one, offer.gateway_id)
        arrival.task = asyncio.get_running_loop().create_task(
            intake._pull(arrival, reserved.block_ids, reserved.present)
        )

    def on_outputs(intake: Intake, outputs: StepOutputs) -> tuple[TokenOutput, ...]:
        for reserved in outputs.reserved:
            answer = intake.questions._reserving.get(reserved.key)
            if answer is not None and not answer.done():
                answer.set_result(reserved)
        step_s = outputs.steps[-1].step_s if outputs.steps else 0.0
        return tuple(intake._on_token(output, step_s) for output in outputs.tokens)

    with _planted(Intake, "reserve", reserve), _planted(Intake, "on_outputs", on_outputs):
        yield


def early_free() -> AbstractContextManager[None]:
    """The blocks of a hand-off go back when it is complete, not when its owner has read it."""
    right = PrefillSide._commit

    def commit(side: PrefillSide, live: Any, progress: Progress) -> None:
        right(side, live, progress)
        side._send(Release(progress.key))

    return _planted(PrefillSide, "_commit", commit)


def endless_lease() -> AbstractContextManager[None]:
    """A lease whose owner is silent does not end."""

    def expire(_outbox: Outbox) -> list[Key]:
        return []

    return _planted(Outbox, "expire", expire)


def unverified_frame() -> AbstractContextManager[None]:
    """Frames are taken as they come."""

    def verify(_frame: Frame) -> None:
        return

    return _planted(Frame, "verify", verify)


def dropped_abort() -> AbstractContextManager[None]:
    """An abort frees what is held under its key, and lets the sequence run on."""

    def abort(engine: Engine, key: Key) -> None:
        engine._release(key)

    return _planted(Engine, "_abort", abort)


PLANTED: dict[str, Callable[[], AbstractContextManager[None]]] = {
    mistake.__name__: mistake
    for mistake in (
        skipped_epoch_fence, double_free, lost_release, reordered_token, ignored_deadline, leaked_reservation,
        early_free, endless_lease, unverified_frame, dropped_abort,
    )
}  # fmt: skip
