"""The loop of a fault run: virtual time, in which each process has a clock of its own, and each of its turns a number.

1. `within` says whose code runs; tasks and timers made there belong to that process, and so do theirs;
2. `time()` is then that process's clock: `set_clock` lets it run faster or slower than the others', and apart from
   them. Everything that the process waits for is measured by it, leases and heartbeats as well as time-outs;
3. outside of all processes (cables, and the durations of steps) time is the true one;
4. when all that happens at one time has happened, `on_quiet` may look at the whole, before time goes on.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from cluster.simulator.clock import VirtualLoop
from cluster.simulator.faults.plan import FaultKind, PointKind
from cluster.simulator.faults.points import Points

OUTSIDE = ""
PROCESS: ContextVar[str] = ContextVar("process", default=OUTSIDE)


class within:
    """The code below is this process's. (A contextmanager would take three times as long, which counts here.)"""

    __slots__ = ("_process", "_token")

    def __init__(self, process: str) -> None:
        self._process = process

    def __enter__(self) -> None:
        self._token = PROCESS.set(self._process)

    def __exit__(self, *_: object) -> None:
        PROCESS.reset(self._token)


@dataclass(frozen=True, slots=True)
class Clock:
    """Shows `shown_s` at the true time `true_s`, and runs on at `rate`."""

    shown_s: float
    true_s: float
    rate: float

    def shows(self, true_s: float) -> float:
        return self.shown_s + (true_s - self.true_s) * self.rate

    def when_it_shows(self, shown_s: float) -> float:
        """The first true time, but for rounding never too early."""
        true_s = self.true_s + (shown_s - self.shown_s) / self.rate
        return true_s if self.shows(true_s) >= shown_s else true_s + 2 * math.ulp(shown_s) / self.rate


class FaultLoop(VirtualLoop):
    def __init__(self, limit_s: float, points: Points) -> None:
        self._clocks: dict[str, Clock] = {}
        self._points = points
        self.on_quiet: Callable[[], None] = lambda: None
        super().__init__(limit_s)

    def time(self) -> float:
        return self.time_of(PROCESS.get()) if self._clocks else self._virtual_s

    @property
    def true_s(self) -> float:
        return self._virtual_s

    def time_of(self, process: str) -> float:
        """What its clock shows."""
        clock = self._clocks.get(process)
        return self._virtual_s if clock is None else clock.shows(self._virtual_s)

    def set_clock(self, process: str, ahead_s: float, rate: float) -> None:
        """From now on. Timers of the process that are armed follow its clock."""
        now = self._virtual_s
        before = self._clocks.get(process, Clock(now, now, 1.0))
        after = self._clocks[process] = Clock(before.shows(now) + ahead_s, now, rate)
        for index, (when, number, timer) in enumerate(self._timers):
            if timer._context.get(PROCESS, OUTSIDE) == process:
                self._timers[index] = (after.when_it_shows(before.shows(when)), number, timer)
        heapq.heapify(self._timers)

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any, context: Any = None) -> Any:
        now = self.time()
        when = max(now + delay, math.nextafter(now, math.inf)) if delay > 0 else now + delay
        return self.call_at(when, callback, *args, context=context)

    def call_at(self, when: float, callback: Callable[..., object], *args: Any, context: Any = None) -> Any:
        process = PROCESS.get()
        if process:
            clock = self._clocks.get(process)
            when = when if clock is None else clock.when_it_shows(when)
            faults = self._points.reach(PointKind.TIMER, process)
            when += sum(fault.for_s for fault in faults if fault.kind is FaultKind.LATE)
        return super().call_at(when, callback, *args, context=context)

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Any = None) -> asyncio.Handle:
        process = PROCESS.get() if context is None else context.get(PROCESS, OUTSIDE)
        if process:
            self._points.reach(PointKind.TURN, process)
        return super().call_soon(callback, *args, context=context)

    def end(self) -> None:
        """No fault strikes what is being taken down."""
        self._points.stop()
        self.on_quiet = lambda: None
        super().end()

    def jump(self) -> None:
        self.on_quiet()
        super().jump()


def fault_loop() -> FaultLoop:
    """The running loop."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, FaultLoop)
    return loop
