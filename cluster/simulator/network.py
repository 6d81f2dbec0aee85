"""The modelled network: calls and streams between simulated processes, with latency, bandwidth and faults.

1. a process attaches under an address; a new life under the same address replaces the old one;
2. a call or a stream takes the latency to get there, is refused if it was meant for another incarnation, runs the
   real worker's method, and its answer takes the latency back. A caller who leaves is noticed there a latency later;
3. what a process sends goes out one after another at its bandwidth, so frames of several pulls share it; a small
   message goes between their packets and takes no time beside the latency;
4. `kill` resets every connection of a process; between `silence` and `restore` nothing gets to it or from it, and what
   was sent meanwhile comes late, in order, as TCP has it.

It knows no worker: `work` and `items` below say what to do there.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from cluster.simulator.log import EventLog
from cluster.simulator.mailbox import Mailbox
from engine.errors import DeadlineExceeded, StaleIncarnation, Unavailable

CALL_BYTES = 256  # of a call without contents, with its headers
SMALL_BYTES = 2**16  # messages up to this size wait for no larger one

Served = TypeVar("Served")
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class LinkTimes:
    """Of every link. The defaults are of the order of a 25 Gbit/s network inside one building."""

    latency_s: float = 2e-4
    bytes_per_s: float = 3e9


@dataclass(slots=True, eq=False)
class Port(Generic[Served]):
    """One process on the network. `served` is what others call there, None for a gateway."""

    name: str
    incarnation: str
    served: Served | None
    lag_s: float = 0.0  # added to the latency of all that it sends, unless
    lags: dict[str, float] = field(default_factory=dict)  # the receiver of this name has its own
    dead: bool = False
    free_at: float = 0.0  # when its last byte so far has left
    talks: dict[Talk, None] = field(default_factory=dict)  # in order of their begin
    reachable: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.reachable.set()


class Talk(ABC):
    """A call or a stream under way, as both ends see it."""

    def __init__(self, caller: Port[Any], what: str) -> None:
        self.caller = caller
        self.what = what
        self.target: Port[Any] | None = None
        self.server: asyncio.Task[None] | None = None
        self.last_at = 0.0  # when the last that was sent to the caller arrives

    @abstractmethod
    def take(self, item: object) -> None:
        """What has arrived at the caller: items as one-tuples, an error, None at the end."""


class Stream(Talk):
    def __init__(self, caller: Port[Any], what: str) -> None:
        super().__init__(caller, what)
        self.arrivals: Mailbox[Any] = Mailbox()

    def take(self, item: object) -> None:
        self.arrivals.put(item)


class Call(Talk):
    """It ends with the first thing that comes."""

    def __init__(self, caller: Port[Any], what: str) -> None:
        super().__init__(caller, what)
        self.answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def take(self, item: object) -> None:
        if self.answer.done():
            return
        if isinstance(item, Exception):
            self.answer.set_exception(item)
        else:
            self.answer.set_result(None)


class Network(Generic[Served]):
    def __init__(self, times: LinkTimes, log: EventLog) -> None:
        self._times = times
        self._log = log
        self._ports: dict[str, Port[Served]] = {}

    def attach(self, address: str, name: str, incarnation: str, served: Served | None) -> Port[Served]:
        port = self._ports[address] = Port(name, incarnation, served)
        return port

    def kill(self, port: Port[Served]) -> None:
        """The process is gone: what it served stops, whoever talked with it sees the connection break."""
        port.dead = True
        for talk in list(port.talks):
            self._close(talk)
            if talk.server is not None and talk.target is port:
                talk.server.cancel()
            self._arrive(talk, Unavailable(f"the connection with {port.name} broke"), self._times.latency_s)

    def silence(self, port: Port[Served]) -> None:
        self._log.add(port.name, "silenced")
        port.reachable.clear()

    def restore(self, port: Port[Served]) -> None:
        self._log.add(port.name, "restored")
        port.reachable.set()

    # --- what links do -------------------------------------------------------------------------------------

    async def call(
        self, caller: Port[Served], address: str, incarnation: str, what: str,
        work: Callable[[Served], Coroutine[Any, Any, None]], timeout_s: float, size_bytes: int = CALL_BYTES,
    ) -> None:  # fmt: skip
        """Run `work` there; returns when its answer is back. Raises what it raised, Unavailable or DeadlineExceeded."""
        loop = asyncio.get_running_loop()
        call = Call(self._alive(caller), what)
        caller.talks[call] = None
        late = DeadlineExceeded(f"a peer did not answer in time: {what} at {address}")
        timeout = loop.call_later(timeout_s, call.take, late)
        comes_at = self._left_at(caller, size_bytes) + self.latency_s(caller, self._ports.get(address))
        loop.call_at(comes_at, self._begin_call, call, address, incarnation, work)
        try:
            await call.answer
        finally:
            timeout.cancel()
            self._close(call)
            if call.server is None or not call.server.done():
                self._hang_up(call, address)

    async def stream(
        self, caller: Port[Served], address: str, incarnation: str, what: str,
        items: Callable[[Served], AsyncGenerator[Item]], size_of: Callable[[Item], int], size_bytes: int = CALL_BYTES,
        sent_at: Callable[[Item], float | None] = lambda _item: None,
    ) -> AsyncGenerator[Item]:  # fmt: skip
        """What `items` yields there, in order. Raises what it raised, or Unavailable when the connection breaks.
        `sent_at` tells of an item that it was sent earlier than it is yielded."""
        talk = Stream(self._alive(caller), what)
        caller.talks[talk] = None
        serving = self._serve(talk, address, incarnation, items, size_of, size_bytes, sent_at)
        talk.server = asyncio.get_running_loop().create_task(serving, name=what)
        try:
            while True:
                item = await talk.arrivals.get()
                if item is None:
                    return
                if isinstance(item, Exception):
                    raise item
                yield item[0]
        finally:
            self._close(talk)
            self._hang_up(talk, address)

    def _alive(self, caller: Port[Served]) -> Port[Served]:
        if caller.dead:
            raise Unavailable(f"{caller.name} is dead")
        return caller

    def _hang_up(self, talk: Talk, address: str) -> None:
        """The caller wants no more: who serves it hears of it when word has got there."""
        delay_s = self.latency_s(talk.caller, self._ports.get(address))
        asyncio.get_running_loop().call_later(delay_s, self._stop, talk)

    def _stop(self, talk: Talk) -> None:
        if talk.server is not None:
            talk.server.cancel()

    # --- the other end -------------------------------------------------------------------------------------

    def _begin_call(
        self, call: Call, address: str, incarnation: str, work: Callable[[Served], Coroutine[Any, Any, None]]
    ) -> None:
        serving = self._serve_call(call, address, incarnation, work)
        call.server = asyncio.get_running_loop().create_task(serving, name=call.what)

    async def _serve_call(
        self, call: Call, address: str, incarnation: str, work: Callable[[Served], Coroutine[Any, Any, None]]
    ) -> None:
        port = await self._reach(call, address)
        if port is None:
            return
        try:
            await work(self._admit(port, incarnation))
            answer: Exception | None = None
        except Exception as error:  # an answer of the worker's, or a bug that the caller shall see as it is
            answer = error
        await self._answer(call, port, answer, CALL_BYTES)

    async def _serve(
        self, talk: Talk, address: str, incarnation: str,
        items: Callable[[Served], AsyncGenerator[Item]], size_of: Callable[[Item], int], size_bytes: int,
        sent_at: Callable[[Item], float | None],
    ) -> None:  # fmt: skip
        await self._send(talk.caller, size_bytes)
        await asyncio.sleep(self.latency_s(talk.caller, self._ports.get(address)))
        port = await self._reach(talk, address)
        if port is None:
            return
        try:
            async with aclosing(items(self._admit(port, incarnation))) as source:
                async for item in source:
                    await self._answer(talk, port, (item,), size_of(item), sent_at(item))
            last: Exception | None = None
        except Exception as error:  # an answer of the worker's, or a bug that the caller shall see as it is
            last = error
        await self._answer(talk, port, last, CALL_BYTES if last else 0)

    async def _reach(self, talk: Talk, address: str) -> Port[Served] | None:
        """Who is there, once word can get there; None if nobody is, which the caller hears."""
        port = self._ports.get(address)
        await talk.caller.reachable.wait()
        if port is not None:
            await port.reachable.wait()
        if port is None or port.dead:
            self._arrive(talk, Unavailable(f"a peer could not be reached: {address}"), self._times.latency_s)
            return None
        self._log.add(port.name, talk.what, caller=talk.caller.name)
        talk.target = port
        port.talks[talk] = None
        return port

    async def _answer(
        self, talk: Talk, port: Port[Served], item: object, size_bytes: int, sent_at: float | None = None
    ) -> None:
        await self._send(port, size_bytes)
        await talk.caller.reachable.wait()
        await port.reachable.wait()
        self._arrive(talk, item, self.latency_s(port, talk.caller), sent_at)

    def _admit(self, port: Port[Served], incarnation: str) -> Served:
        if incarnation != port.incarnation:
            raise StaleIncarnation(f"this worker is now incarnation {port.incarnation}")
        assert port.served is not None, f"{port.name} serves nothing"
        return port.served

    async def _send(self, port: Port[Served], size_bytes: int) -> None:
        """Returns when the last byte has left."""
        now = asyncio.get_running_loop().time()
        if (left_at := self._left_at(port, size_bytes)) > now:
            await asyncio.sleep(left_at - now)

    def _left_at(self, port: Port[Served], size_bytes: int) -> float:
        """When the last byte leaves of what is sent now."""
        now = asyncio.get_running_loop().time()
        if size_bytes <= SMALL_BYTES:
            return now
        port.free_at = max(now, port.free_at) + size_bytes / self._times.bytes_per_s
        return port.free_at

    def _arrive(self, talk: Talk, item: object, after_s: float, sent_at: float | None = None) -> None:
        """What is sent on one connection arrives in order."""
        loop = asyncio.get_running_loop()
        talk.last_at = max(talk.last_at, (loop.time() if sent_at is None else sent_at) + after_s)
        loop.call_at(talk.last_at, talk.take, item)

    def latency_s(self, sender: Port[Served], receiver: Port[Served] | None) -> float:
        """From the sending of a small message to its arrival."""
        lag_s = sender.lags.get(receiver.name, sender.lag_s) if receiver is not None else sender.lag_s
        return self._times.latency_s + lag_s

    def _close(self, talk: Talk) -> None:
        talk.caller.talks.pop(talk, None)
        if talk.target is not None:
            talk.target.talks.pop(talk, None)
