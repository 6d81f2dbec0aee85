"""The virtual clock: an event loop whose time jumps to the next timer as soon as nothing is ready.

1. callbacks and tasks run as in any asyncio loop, in the order in which they became ready;
2. when nothing is ready, `time()` becomes the next timer's, at once; equal timers fire first come, first served;
3. nothing ready and no timer left is a Deadlock, which names every task that waits;
4. threads, sockets and child processes do not exist: whoever asks for one gets an error.

It starts at 0 and knows nothing of what runs on it. It is asyncio's own loop but for its heart, `_run_once`, and the
handles, of which a long simulation has millions: they do without what only real time and debugging need.
"""

from __future__ import annotations

import asyncio
import gc
import heapq
import math
import weakref
from asyncio import base_events
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any, NoReturn, TypeVar

MANY_CANCELLED = 100

Result = TypeVar("Result")


class Deadlock(RuntimeError):
    """Tasks wait for what can never come."""


class LostErrors(RuntimeError):
    """Something failed and nobody noticed; the first error is the cause."""


class TimeLimit(RuntimeError):
    """The virtual time that a run was given is over."""


class VirtualLoop(base_events.BaseEventLoop):
    """The same program gives the same order of callbacks in every process."""

    _ready: deque[asyncio.Handle]  # asyncio's own, as is
    _stopping: bool

    def __init__(self, limit_s: float = math.inf) -> None:
        super().__init__()
        self._virtual_s = 0.0
        self._limit_s = limit_s
        self._timers: list[tuple[float, int, _Timer]] = []  # a heap; the number keeps equal times in order
        self._num_timers = 0
        self._num_cancelled = 0  # of those in the heap
        self._task_numbers: weakref.WeakKeyDictionary[asyncio.Future[Any], int] = weakref.WeakKeyDictionary()
        self._num_tasks = 0
        self.num_calls = 0  # callbacks so far
        self._quiet: deque[asyncio.Future[None]] = deque()

    def time(self) -> float:
        return self._virtual_s

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any, context: Any = None) -> _Timer:
        """A positive delay always takes time, however small: whoever sleeps the rest of a span comes to its end."""
        when = self._virtual_s + delay
        if delay > 0 and when == self._virtual_s:
            when = math.nextafter(self._virtual_s, math.inf)
        return self.call_at(when, callback, *args, context=context)

    def call_at(self, when: float, callback: Callable[..., object], *args: Any, context: Any = None) -> _Timer:
        assert not self.is_closed()
        self._num_timers += 1
        timer = _Timer(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, self._num_timers, timer))
        return timer

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Any = None) -> asyncio.Handle:
        assert not self.is_closed()
        handle = _Soon(callback, args, self, context)
        self._ready.append(handle)
        return handle

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

    async def quiet(self) -> None:
        """Returns when all that can happen at this time has."""
        waiter = self.create_future()
        self._quiet.append(waiter)
        await waiter

    def jump(self) -> None:
        """Nothing is ready: let the next that waits for that go on, or make the next timer due. Raises Deadlock or
        TimeLimit."""
        if self._quiet:
            waiter = self._quiet.popleft()
            if not waiter.done():
                waiter.set_result(None)
            return
        self._drop_cancelled()
        if not self._timers:
            raise Deadlock(
                f"at {self._virtual_s:.9f} s nothing can ever happen again, and these wait:\n{self._waiting()}"
            )
        when = self._timers[0][0]
        if when > self._limit_s:
            raise TimeLimit(f"{self._limit_s:g} s of virtual time are over, and these wait:\n{self._waiting()}")
        self._virtual_s = when

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

    def _run_once(self) -> None:
        """Make due timers ready, then run all that is ready now; what that makes ready has its turn next time."""
        ready, timers = self._ready, self._timers
        if not (ready or self._stopping or (timers and timers[0][0] <= self._virtual_s)):
            self.jump()
        while timers and timers[0][0] <= self._virtual_s:
            timer = heapq.heappop(timers)[2]
            timer.in_heap = False
            self._num_cancelled -= timer._cancelled
            ready.append(timer)
        self.num_calls += len(ready)
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            try:
                handle._context.run(handle._callback, *handle._args)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:
                words = f"exception in {handle!r}"
                self.call_exception_handler({"message": words, "exception": error, "handle": handle})

    def count_cancelled(self) -> None:
        """Cancelled timers are swept out of the heap when they are most of it."""
        self._num_cancelled += 1
        if self._num_cancelled > MANY_CANCELLED and 2 * self._num_cancelled > len(self._timers):
            self._timers[:] = [entry for entry in self._timers if not entry[2]._cancelled]
            heapq.heapify(self._timers)
            self._num_cancelled = 0

    def _drop_cancelled(self) -> None:
        while self._timers and self._timers[0][2]._cancelled:
            heapq.heappop(self._timers)
            self._num_cancelled -= 1

    def _waiting(self) -> str:
        return "\n".join(f"  {task.get_name()}: {_where(task)}" for task in self.pending())

    def _write_to_self(self) -> None:
        """Nothing to wake: this loop never sleeps."""


def _nothing() -> None:
    pass


class _Soon(asyncio.Handle):
    """A callback that is ready."""

    __slots__ = ()

    def __init__(self, callback: Any, args: Any, loop: Any, context: Any) -> None:
        self._context = copy_context() if context is None else context
        self._loop = loop
        self._callback = callback
        self._args = args
        self._cancelled = False
        self._repr = None
        self._source_traceback = None


class _Timer(asyncio.TimerHandle):
    """A callback that is due at a time."""

    __slots__ = ("in_heap",)
    in_heap: bool

    def __init__(self, when: float, callback: Any, args: Any, loop: Any, context: Any) -> None:
        self._when = when
        self._scheduled = self.in_heap = True
        self._context = copy_context() if context is None else context
        self._loop = loop
        self._callback = callback
        self._args = args
        self._cancelled = False
        self._repr = None
        self._source_traceback = None

    def cancel(self) -> None:
        if not self._cancelled:
            self._cancelled = True
            self._callback, self._args = _nothing, ()  # lets go of what it would have called
            if self.in_heap:
                self._loop.count_cancelled()


def virtual_loop() -> VirtualLoop:
    """The running loop."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    return loop


def run_virtual(main: Coroutine[Any, Any, Result], limit_s: float = math.inf) -> Result:
    """Run to the end in virtual time; tasks that are left then are cancelled, in order.

    Raises TimeLimit when more than `limit_s` of virtual time would pass, and LostErrors when tasks failed and nobody
    asked them how they fared."""
    return run_on(VirtualLoop(limit_s), main)


def run_on(loop: VirtualLoop, main: Coroutine[Any, Any, Result]) -> Result:
    """The same on a loop that was made for it; it is closed in the end."""
    lost: list[BaseException] = []
    loop.set_exception_handler(lambda _, context: lost.append(_error_of(context)))
    with _collecting_what_is_new():
        try:
            result = loop.run_until_complete(main)
        finally:
            loop.end()
        gc.collect()  # asyncio tells of such a task when it is collected
    if lost:
        raise LostErrors(f"{len(lost)} errors reached nobody") from lost[0]
    return result


@contextmanager
def _collecting_what_is_new() -> Iterator[None]:
    """What was there before holds no task of this run: to look it through takes longer than a short run itself."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _error_of(context: dict[str, Any]) -> BaseException:
    return context.get("exception") or RuntimeError(context["message"])


def _where(task: asyncio.Task[Any]) -> str:
    """From the task's own coroutine to the innermost one that it waits in."""
    steps, awaited = [], task.get_coro()
    while (frame := getattr(awaited, "cr_frame", None) or getattr(awaited, "ag_frame", None)) is not None:
        steps.append(f"{frame.f_code.co_qualname}:{frame.f_lineno}")
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "ag_await", None)
    return " > ".join(steps) or repr(task)
