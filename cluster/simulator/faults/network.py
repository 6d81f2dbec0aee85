"""The network of a fault run: the modelled one, on which messages are delayed, overtaken, lost, doubled or spoilt.

1. a call's or a stream's request, each of its answers and its end is a message on the link between the two processes;
2. what a fault says of it is done before it is sent, so that nothing of another call or stream waits for it, and
   everything of its own does: one stream keeps its order, as TCP has it;
3. a link that is cut holds everything back until it is mended, also the word that a caller has left;
4. what a worker does for a caller runs within that worker, by its clock.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

from cluster.sides import WorkerSides
from cluster.simulator.faults.loop import OUTSIDE, PROCESS, within
from cluster.simulator.faults.plan import Fault, FaultKind, How, link
from cluster.simulator.faults.points import Points
from cluster.simulator.log import EventLog
from cluster.simulator.network import CALL_BYTES, LinkTimes, Network, Port, Stream, Talk
from engine.errors import DeadlineExceeded, Unavailable
from kv_transfer.frames import Commit, Frame

LONGEST_HOLD_S = 0.5  # of a message that waits to be overtaken, where nothing comes
CALLS = (
    "submit",
    "abort",
    "offer",
    "release",
    "renew",
    "move",
    "copy",
)  # one request, one answer; all else are streams
FRAME = "frame"  # what a census calls an item of a pull

Item = TypeVar("Item")


class FaultyNetwork(Network[WorkerSides]):
    def __init__(self, times: LinkTimes, log: EventLog, points: Points) -> None:
        super().__init__(times, log)
        self._points = points
        self._cuts: dict[str, int] = {}  # links that are cut, and how often
        self._mended = asyncio.Event()
        self._held: dict[str, list[tuple[Talk, asyncio.Event]]] = {}  # by link, what waits to be overtaken
        self._mute: dict[Talk, None] = {}  # calls of which something was lost

    def cut(self, link_name: str) -> None:
        self._cuts[link_name] = self._cuts.get(link_name, 0) + 1

    def mend(self, link_name: str) -> None:
        self._cuts[link_name] -= 1
        if not self._cuts[link_name]:
            del self._cuts[link_name]
        self._mended.set()
        self._mended = asyncio.Event()

    async def call(
        self, caller: Port[WorkerSides], address: str, incarnation: str, what: str,
        work: Callable[[WorkerSides], Coroutine[Any, Any, None]], timeout_s: float, size_bytes: int = CALL_BYTES,
    ) -> None:  # fmt: skip
        """A stream of one item, so that faults strike both alike."""

        async def items(sides: WorkerSides) -> AsyncGenerator[None]:
            await work(sides)
            yield

        def size_of(_answer: None) -> int:
            return CALL_BYTES

        answers = self.stream(caller, address, incarnation, what, items, size_of, size_bytes)
        try:
            async with asyncio.timeout(timeout_s), aclosing(answers):
                async for _ in answers:
                    return
        except TimeoutError:
            raise DeadlineExceeded(f"a peer did not answer in time: {what} at {address}") from None

    # --- messages ------------------------------------------------------------------------------------------

    async def _serve(
        self, talk: Talk, address: str, incarnation: str, items: Callable[[WorkerSides], AsyncGenerator[Item]],
        size_of: Callable[[Item], int], size_bytes: int, sent_at: Callable[[Item], float | None],
    ) -> None:  # fmt: skip
        PROCESS.set(OUTSIDE)
        port = self._ports.get(address)
        name = port.name if port is not None else address
        way, what = link(talk.caller.name, name), talk.what
        faults = self._points.reach_message(way, what)
        await self._hold_up(talk, way, faults)
        if any(fault.kind is FaultKind.LOSE for fault in faults):
            return

        def there(sides: WorkerSides) -> AsyncGenerator[Item]:
            return _within(name, items(sides))

        async def serve_again(twin: Talk, after_s: float) -> None:
            await asyncio.sleep(after_s)
            try:
                await super(FaultyNetwork, self)._serve(twin, address, incarnation, there, size_of, size_bytes, sent_at)
            finally:
                self._close(twin)

        for fault in faults:
            if fault.kind is FaultKind.DUPLICATE and what in CALLS:
                twin = Stream(talk.caller, what)
                twin.server = asyncio.get_running_loop().create_task(serve_again(twin, fault.for_s), name=what)
        await super()._serve(talk, address, incarnation, there, size_of, size_bytes, sent_at)

    async def _answer(
        self, talk: Talk, port: Port[WorkerSides], item: object, size_bytes: int, sent_at: float | None = None
    ) -> None:
        way = link(port.name, talk.caller.name)
        faults = self._points.reach_message(way, _what(talk, item))
        await self._hold_up(talk, way, faults)
        if any(fault.kind is FaultKind.LOSE for fault in faults):
            broke = Unavailable(f"the connection with {port.name} broke")
            if talk.what in CALLS:
                self._mute[talk] = None
            elif isinstance(item, tuple):
                raise broke  # which becomes the stream's last message
            item = broke
        for fault in faults:
            if fault.kind is FaultKind.CORRUPT and isinstance(item, tuple):
                item = (_corrupted(item[0], fault.how),)
        if talk not in self._mute:
            await super()._answer(talk, port, item, size_bytes, sent_at)

    async def _hold_up(self, talk: Talk, way: str, faults: Iterable[Fault]) -> None:
        """Returns when the message may go."""
        await asyncio.sleep(sum(fault.for_s for fault in faults if fault.kind is FaultKind.DELAY))
        if any(fault.kind is FaultKind.REORDER for fault in faults):
            await self._be_overtaken(talk, way)
        while way in self._cuts:
            await self._mended.wait()
        for held, overtaken in self._held.get(way, ()):
            if held is not talk:
                overtaken.set()

    async def _be_overtaken(self, talk: Talk, way: str) -> None:
        entry = (talk, asyncio.Event())
        self._held.setdefault(way, []).append(entry)
        try:
            async with asyncio.timeout(LONGEST_HOLD_S):
                await entry[1].wait()
        except TimeoutError:
            return
        finally:
            self._held[way].remove(entry)

    # --- the caller's end ----------------------------------------------------------------------------------

    def _arrive(self, talk: Talk, item: object, after_s: float, sent_at: float | None = None) -> None:
        with within(OUTSIDE):
            super()._arrive(talk, item, after_s, sent_at)

    def _hang_up(self, talk: Talk, address: str) -> None:
        self._mute.pop(talk, None)
        with within(OUTSIDE):
            port = self._ports.get(address)
            if port is None or link(talk.caller.name, port.name) not in self._cuts:
                super()._hang_up(talk, address)
            else:
                asyncio.get_running_loop().create_task(self._hang_up_late(talk, address, port.name))

    async def _hang_up_late(self, talk: Talk, address: str, name: str) -> None:
        while link(talk.caller.name, name) in self._cuts:
            await self._mended.wait()
        super()._hang_up(talk, address)


async def _within(process: str, items: AsyncGenerator[Item]) -> AsyncGenerator[Item]:
    """The same items, each made by that process."""
    try:
        while True:
            try:
                with within(process):
                    item = await anext(items)
            except StopAsyncIteration:
                return
            yield item
    finally:
        with within(process):
            await items.aclose()


def _what(talk: Talk, item: object) -> str:
    """Of an answer, for the census."""
    if isinstance(item, tuple) and isinstance(item[0], Frame | Commit):
        return FRAME
    return f"{talk.what} answer" if item is not None else f"{talk.what} end"


def _corrupted(message: object, how: How) -> object:
    """A frame or a COMMIT with one bit wrong; all else is left as it is."""
    match message, how:
        case Frame(), How.DIGEST:
            return replace(message, digest=message.digest ^ 1)
        case Frame(), How.NUMBER:
            return replace(message, index=message.index ^ 1)
        case Frame(), _:
            return replace(message, payload=_flipped(bytes(message.payload)))
        case Commit(), How.DIGEST:
            return replace(message, digest=message.digest ^ 1)
        case Commit(), How.NUMBER:
            return replace(message, num_frames=message.num_frames ^ 1)
        case Commit(), _:
            return replace(message, handoff=_flipped(message.handoff))
    return message


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
