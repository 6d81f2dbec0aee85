"""Virtual time: it jumps, it never goes wrong in silence, and the order of things is always the same."""

from __future__ import annotations

import asyncio
import gc

import pytest

from cluster.simulator.clock import Deadlock, LostErrors, TimeLimit, VirtualLoop, run_virtual
from cluster.simulator.log import EventLog


def now() -> float:
    return asyncio.get_running_loop().time()


def test_a_day_of_sleep_ends_exactly_then() -> None:
    async def main() -> float:
        for _ in range(24):
            await asyncio.sleep(3600)
        return now()

    assert run_virtual(main()) == 24 * 3600


def test_sleepers_wake_by_time_and_at_equal_times_in_the_order_in_which_they_lay_down() -> None:
    woken: list[tuple[float, str]] = []

    async def sleeper(name: str, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        woken.append((now(), name))

    async def main() -> None:
        names = [f"equal {index}" for index in range(20)]
        await asyncio.gather(sleeper("last", 3), *(sleeper(name, 2) for name in names), sleeper("first", 1))
        assert woken == [(1.0, "first"), *((2.0, name) for name in names), (3.0, "last")]

    run_virtual(main())


def test_a_positive_delay_always_moves_the_clock() -> None:
    """Whoever sleeps the rest of a span, again and again, comes to its end."""

    async def main() -> None:
        await asyncio.sleep(4090.1)
        before = now()
        await asyncio.sleep(1e-300)
        assert now() > before
        for _ in range(1000):
            begun = now()
            while (left := 7.3 - (now() - begun)) > 0:  # noqa: ASYNC110
                await asyncio.sleep(left)

    run_virtual(main())


def test_ready_tasks_run_before_time_moves() -> None:
    async def main() -> None:
        queue: asyncio.Queue[float] = asyncio.Queue()
        asyncio.get_running_loop().call_later(5, queue.put_nowait, 5.0)
        for _ in range(100):
            await asyncio.sleep(0)
        assert now() == 0
        assert await queue.get() == now() == 5

    run_virtual(main())


def test_asyncio_s_own_tools_work() -> None:
    async def main() -> list[str]:
        seen: list[str] = []
        event = asyncio.Event()

        async def setter() -> None:
            await asyncio.sleep(10)
            event.set()

        async def waiter() -> None:
            await event.wait()
            seen.append(f"event {now()}")

        async with asyncio.TaskGroup() as group:
            group.create_task(waiter())
            group.create_task(setter())
        try:
            async with asyncio.timeout(5):
                await asyncio.Event().wait()
        except TimeoutError:
            seen.append(f"timeout {now()}")
        async with asyncio.timeout(1) as patience:
            patience.reschedule(now() + 100)
            await asyncio.sleep(50)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.sleep(10), 2)
        _, late = await asyncio.wait([asyncio.create_task(asyncio.sleep(9))], timeout=1)
        assert len(late) == 1
        return [*seen, f"end {now()}"]

    assert run_virtual(main()) == ["event 10.0", "timeout 15.0", "end 68.0"]


def test_a_deadlock_names_every_task_that_waits() -> None:
    async def inner() -> None:
        await asyncio.Event().wait()

    async def stuck() -> None:
        await inner()

    async def main() -> None:
        await asyncio.sleep(2)
        await asyncio.create_task(stuck(), name="the stuck one")

    with pytest.raises(
        Deadlock, match=r"(?s)at 2\.0+ s .*main:\d+.*the stuck one: .*stuck:\d+ > .*inner:\d+ > Event\.wait"
    ):
        run_virtual(main())


def test_time_that_never_ends_is_limited() -> None:
    async def main() -> None:
        async def ticking() -> None:
            while True:  # noqa: ASYNC110
                await asyncio.sleep(1)

        ticker = asyncio.create_task(ticking(), name="ticker")
        await asyncio.Event().wait()
        ticker.cancel()

    with pytest.raises(TimeLimit, match=r"(?s)100 s .*ticker"):
        run_virtual(main(), limit_s=100)


def test_threads_sockets_and_processes_are_refused() -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="no threads in virtual time"):
            await asyncio.to_thread(print)
        with pytest.raises(RuntimeError, match="no threads in virtual time"):
            await asyncio.open_connection("localhost", 80)
        with pytest.raises(NotImplementedError):
            await asyncio.create_subprocess_exec("true")

    run_virtual(main())


def test_an_error_of_a_task_that_nobody_awaits_is_not_lost() -> None:
    async def failing() -> None:
        raise ValueError("unseen")

    async def main() -> None:
        asyncio.create_task(failing())  # noqa: RUF006
        await asyncio.sleep(1)

    with pytest.raises(LostErrors) as caught:
        run_virtual(main())
    assert isinstance(caught.value.__cause__, ValueError)


def test_an_error_of_a_task_in_a_cycle_is_not_lost_and_what_was_there_before_is_not_looked_through() -> None:
    async def failing(cycle: list[object]) -> None:
        raise ValueError("unseen")

    async def main() -> None:
        cycle: list[object] = []
        cycle.append(asyncio.create_task(failing(cycle)))
        await asyncio.sleep(1)
        assert gc.get_freeze_count() > before

    before = gc.get_freeze_count()
    with pytest.raises(LostErrors):
        run_virtual(main())
    assert gc.get_freeze_count() <= before


def test_what_is_left_is_cancelled_in_order_and_may_take_its_time() -> None:
    ended: list[tuple[str, float]] = []

    async def left(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(1)
            ended.append((name, now()))

    async def main() -> str:
        main.tasks = [asyncio.create_task(left(f"task {index}")) for index in range(20)]  # type: ignore[attr-defined]
        await asyncio.sleep(1)
        return "done"

    assert run_virtual(main()) == "done"
    assert ended == [(f"task {index}", 2.0) for index in range(20)]


def test_an_error_of_main_is_raised_and_the_loop_is_closed() -> None:
    loops: list[VirtualLoop] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loops.append(loop)
        raise ValueError("of main")

    with pytest.raises(ValueError, match="of main"):
        run_virtual(main())
    assert loops[0].is_closed()


def test_a_log_is_the_same_bytes_whatever_the_order_of_its_values() -> None:
    def written(**values: str | int | float | None) -> bytes:
        async def main() -> bytes:
            log = EventLog()
            await asyncio.sleep(0.1)
            log.add("decode-0", "step", None, **values)
            assert log.num_records == 1
            return log.to_bytes()

        return run_virtual(main())

    text = b"0.100000000 decode-0 step count=3 ids=1,2 none=None step_s=0.250000000 why=two_words\n"
    assert written(step_s=0.25, count=3, none=None, why="two words", ids="1,2") == text
    assert written(ids="1,2", why="two words", none=None, count=3, step_s=0.25) == text
