"""A worker in a process of its own, without Ray: `python -m tests.faults.worker_process`.

1. reads Orders, one line of JSON, on its standard input; 2. starts cluster.worker.Worker and prints its Member as one
line of JSON; 3. serves until it is killed, or until whoever gave the orders is gone.

Requests with these names make it hurt itself, at a moment that nobody outside could find for certain: FATAL_PREFILL and
FATAL_PULL kill it (SIGKILL), the decode worker has no file descriptor left from a STARVED request until another comes,
and after one that is STARVED_AT_THE_DOOR none while it opens the producer's pool.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import signal
import sys
from dataclasses import dataclass, fields

from cluster.config import load_config
from cluster.spec import WorkerSpec
from cluster.worker import Worker
from engine.planes import CacheLayout
from engine.types import Key, Role, StepOutputs
from kv_transfer.carriers import choice
from kv_transfer.carriers.door import OpenPool
from kv_transfer.frames import Frame, PlacedFrame
from kv_transfer.lease import Offer
from kv_transfer.pull import Puller

FATAL_PREFILL = "dies while its prompt is computed"
FATAL_PULL = "dies while its blocks arrive"
STARVED = "leaves no descriptor"
STARVED_AT_THE_DOOR = "leaves no descriptor for a pool"
FATAL_FRAME = 3  # the number of the frame that is the last one


@dataclass(frozen=True, slots=True)
class Orders:
    """`secret`: the cluster's, as hex. `overrides`: of configs/local.yaml."""

    worker_id: str
    role: str
    host: str
    secret: str
    overrides: dict[str, object]


async def main() -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    orders = Orders(**json.loads(await reader.readline()))
    config = load_config("configs/local.yaml", orders.overrides)
    spec = WorkerSpec(orders.worker_id, os.urandom(4).hex(), Role(orders.role), orders.host)
    worker = Worker(spec, config, bytes.fromhex(orders.secret))
    member = await worker.start()
    _make_mortal(worker)
    _make_hungry(worker)
    told = {one.name: getattr(member, one.name) for one in fields(member) if one.init}
    print(json.dumps(told), flush=True)
    await reader.read()
    await worker.stop()


def _make_mortal(worker: Worker) -> None:
    sides = worker._sides
    distribute, take = sides._distribute, Puller._take
    dying: list[asyncio.Task[None]] = []

    def die_in_prefill(outputs: StepOutputs) -> None:
        """Once frames of its first blocks have gone out; what the engine has computed after them is never told."""
        if dying:
            return
        distribute(outputs)
        for progress in outputs.progress:
            if progress.key.request_id == FATAL_PREFILL and progress.block_ids and not progress.done:
                dying.append(asyncio.create_task(die_after_a_frame(progress.key)))

    async def die_after_a_frame(key: Key) -> None:
        while not sides.outbox._entries[key].digests:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        os.kill(os.getpid(), signal.SIGKILL)

    def die_in_pull(self: Puller, frame: Frame | PlacedFrame) -> None:
        take(self, frame)
        if self._lease.key.request_id == FATAL_PULL and len(self._digests) == FATAL_FRAME:
            os.kill(os.getpid(), signal.SIGKILL)

    sides._distribute, Puller._take = die_in_prefill, die_in_pull


def _make_hungry(worker: Worker) -> None:
    sides = worker._sides
    take_offer, open_pool = sides.take_offer, choice.open_pool
    asked = ""

    async def starve_at_offer(offer: Offer) -> None:
        nonlocal asked
        asked = offer.lease.key.request_id
        _starve(asked == STARVED)
        await take_offer(offer)

    async def starve_at_door(layout: CacheLayout, token: str, incarnation: str) -> OpenPool:
        _starve(asked in (STARVED, STARVED_AT_THE_DOOR))
        try:
            return await open_pool(layout, token, incarnation)
        finally:
            _starve(asked == STARVED)

    sides.take_offer, choice.open_pool = starve_at_offer, starve_at_door


def _starve(hungry: bool) -> None:
    """Let no new descriptor be had, or as many as ever."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0) if hungry else most
    if hungry:
        os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, most))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    asyncio.run(main())
