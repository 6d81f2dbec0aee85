"""The virtual clock: an event loop whose time jumps to the next timer as soon as nothing is ready.

1. callbacks and tasks run as in any asyncio loop, in the order in which they became ready;
2. when nothing is ready, `time()` becomes the next timer's, at once; equal timers fire first come, first served;
3. nothing ready and no timer left is a Deadlock, which names every task that waits;
4. threads, sockets and child processes do not exist: whoever asks for one gets an error.

It starts at 0 and knows nothing of what runs on it.
"""

from __future__ import annotations

import asyncio
import gc
import heapq
import math
import weakref
from asyncio import base_events
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn, TypeVar

Result = TypeVar("Result")


class Deadlock(RuntimeError):
    """Tasks wait for what can never come."""


class LostErrors(RuntimeError):
    """Something failed and nobody noticed; the first error is the cause."""


class TimeLimit(RuntimeError):
    """The virtual time that a run was given is over."""


class VirtualLoop(base_events.BaseEventLoop):
    """The same program gives the same order of callbacks in every process."""

    _scheduled: list[_Timer]  # asyncio's own heap

    def __init__(self, limit_s: float = math.inf) -> None:
        super().__init__()
        self._selector = _Jump(self)
        self._set_time(0.0)
        self._limit_s = limit_s
        self._num_timers = 0
        self._task_numbers: weakref.WeakKeyDictionary[asyncio.Future[Any], int] = weakref.WeakKeyDictionary()
        self._num_tasks = 0

    def time(self) -> float:
        return self._virtual_s

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any, context: Any = None) -> _Timer:
        """A positive delay always takes time, however small: whoever sleeps the rest of a span comes to its end."""
        when = self._virtual_s + delay
        if delay > 0:
            when = max(when, math.nextafter(self._virtual_s, math.inf))
        return self.call_at(when, callback, *args, context=context)

    def call_at(self, when: float, callback: Callable[..., object], *args: Any, context: Any = None) -> _Timer:
        assert not self.is_closed()
        self._num_timers += 1
        timer = _Timer(when, callback, args, self, context)
        timer.number = self._num_timers
        timer._scheduled = True
        heapq.heappush(self._scheduled, timer)
        return timer

    def create_task(self, coro: Any, *, name: Any = None, context: Any = None) -> asyncio.Task[Any]:
        task = super().create_task(coro, name=name, context=context)
        self._num_tasks += 1
        self._task_numbers[task] = self._num_tasks
        return task

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> NoReturn:
        raise RuntimeError(f"there are no threads in virtual time for {func!r} (to_thread, run_in_executor)")

    def pending(self) -> list[asyncio.Task[Any]]:
        """Tasks that are not done, in the order of their creation."""
        return sorted(asyncio.all_tasks(self), key=lambda task: self._task_numbers[task])

    def jump(self) -> None:
        """Nothing is ready: make the next timer due. Raises Deadlock or TimeLimit."""
        if not self._scheduled:
            raise Deadlock(
                f"at {self._virtual_s:.9f} s nothing can ever happen again, and these wait:\n{self._waiting()}"
            )
        when = self._scheduled[0].when()
        if when > self._limit_s:
            raise TimeLimit(f"{self._limit_s:g} s of virtual time are over, and these wait:\n{self._waiting()}")
        self._set_time(when)

    def end(self) -> None:
        """Cancel what is left, in order, let it finish, and close."""
        try:
            self._limit_s = math.inf
            while left := self.pending():
                for task in left:
                    task.cancel()
                self.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            self.run_until_complete(self.shutdown_asyncgens())
        finally:
            self.close()

    def _set_time(self, now: float) -> None:
        self._virtual_s = now
        self._clock_resolution = math.ulp(now)  # what is due is due exactly now, not a little later

    def _waiting(self) -> str:
        return "\n".join(f"  {task.get_name()}: {_where(task)}" for task in self.pending())

    # --- what asyncio asks of a loop that could wait for the outside ----------------------------------------

    def _process_events(self, event_list: object) -> None:
        """No sockets, no events."""

    def _write_to_self(self) -> None:
        """Nothing to wake: this loop never sleeps."""


class _Timer(asyncio.TimerHandle):
    """A timer that goes after all earlier ones of the same time."""

    __slots__ = ("number",)
    number: int

    def __lt__(self, other: object) -> bool:
        assert isinstance(other, _Timer)
        return (self._when, self.number) < (other._when, other.number)


class _Jump:
    """Stands where asyncio expects a selector: where it would sleep, time jumps."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> tuple[()]:
        if timeout is None or timeout > 0:
            self._loop.jump()
        return ()


def run_virtual(main: Coroutine[Any, Any, Result], limit_s: float = math.inf) -> Result:
    """Run to the end in virtual time; tasks that are left then are cancelled, in order.

    Raises TimeLimit when more than `limit_s` of virtual time would pass, and LostErrors when tasks failed and nobody
    asked them how they fared."""
    return run_on(VirtualLoop(limit_s), main)


def run_on(loop: VirtualLoop, main: Coroutine[Any, Any, Result]) -> Result:
    """The same on a loop that was made for it; it is closed in the end."""
    lost: list[BaseException] = []
    loop.set_exception_handler(lambda _, context: lost.append(_error_of(context)))
    try:
        result = loop.run_until_complete(main)
    finally:
        loop.end()
    gc.collect()  # asyncio tells of such a task when it is collected
    if lost:
        raise LostErrors(f"{len(lost)} errors reached nobody") from lost[0]
    return result


def _error_of(context: dict[str, Any]) -> BaseException:
    return context.get("exception") or RuntimeError(context["message"])


def _where(task: asyncio.Task[Any]) -> str:
    """From the task's own coroutine to the innermost one that it waits in."""
    steps, awaited = [], task.get_coro()
    while (frame := getattr(awaited, "cr_frame", None) or getattr(awaited, "ag_frame", None)) is not None:
        steps.append(f"{frame.f_code.co_qualname}:{frame.f_lineno}")
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "ag_await", None)
    return " > ".join(steps) or repr(task)
