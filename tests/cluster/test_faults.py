"""Fault runs: where faults strike, what each kind does, that a run can be repeated, and that what is wrong is seen."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine
from pathlib import Path

import pytest

from cluster.sides import WorkerSides
from cluster.simulator.clock import run_on
from cluster.simulator.faults import invariants
from cluster.simulator.faults.case import Case, load_case, to_json
from cluster.simulator.faults.cases import Cases
from cluster.simulator.faults.loop import FaultLoop, within
from cluster.simulator.faults.minimise import fewer
from cluster.simulator.faults.network import FaultyNetwork
from cluster.simulator.faults.plan import Fault, FaultKind, How, Plan, Point, PointKind, ends_of
from cluster.simulator.faults.points import Points
from cluster.simulator.faults.run import run_case
from cluster.simulator.log import EventLog
from cluster.simulator.network import LinkTimes, Port
from engine.engine import Engine
from engine.errors import ConfigError, DeadlineExceeded, Unavailable
from engine.types import Add, Request, Sampled, SamplingParams
from tests.cluster.fault_cases import asked, scenario

ROOT = Path(__file__).resolve().parents[2]
TWO = (asked("r0"), asked("r1", at_s=0.03, num_own=9, num_answers=2))

Main = Callable[[FaultLoop], Coroutine[None, None, None]]


def at(kind: PointKind, where: str, number: int) -> Point:
    return Point(kind, where, number)


def message(way: str, number: int, kind: FaultKind, for_s: float = 0.0) -> Fault:
    return Fault(at(PointKind.MESSAGE, way, number), kind, for_s=for_s)


# --- a case and its file ----------------------------------------------------------------------------------------


def test_a_case_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    case = Cases().of(13)
    assert case.plan
    file = tmp_path / "case.json"
    file.write_text(to_json(case))
    assert load_case(file) == case


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        ('"num_blocks"', '"num_block"', "scenario.num_blocks"),
        ('"plan"', '"plans"', "plan"),
        ("40", '"many"', "scenario.num_blocks"),
        ("{", "", "Invalid JSON"),
    ],
    ids=str,
)
def test_a_wrong_file_is_refused_with_the_name_of_what_is_wrong(tmp_path: Path, old: str, new: str, wrong: str) -> None:
    file = tmp_path / "case.json"
    file.write_text(to_json(Case(scenario())).replace(old, new, 1))
    with pytest.raises(ConfigError, match=wrong):
        load_case(file)


def test_a_file_that_is_not_there_is_an_error_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_case(tmp_path / "nothing.json")


# --- the same again ---------------------------------------------------------------------------------------------


def bytes_of(seed: int) -> bytes:
    log = EventLog()
    run_case(Cases().of(seed), log)
    return log.to_bytes()


def test_a_seed_gives_the_same_bytes_again_and_in_a_process_with_other_hashes() -> None:
    code = "import sys, tests.cluster.test_faults as t; sys.stdout.buffer.write(t.bytes_of(13))"
    environ = os.environ | {"PYTHONHASHSEED": "4242"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, stdout=subprocess.PIPE, check=True)
    assert run.stdout == bytes_of(13) == bytes_of(13) != bytes_of(14)


# --- points, clocks ---------------------------------------------------------------------------------------------


def play(main: Main, plan: Plan = (), strike: Callable[[Fault], None] = lambda _: None) -> None:
    loop = FaultLoop(1000.0, Points(plan, strike))
    run_on(loop, main(loop))


def test_a_fault_strikes_before_the_very_turn_that_it_names() -> None:
    seen: list[str] = []

    async def process() -> None:
        for turn in range(3):
            seen.append(f"turn {turn}")
            await asyncio.sleep(1)

    async def main(loop: FaultLoop) -> None:
        with within("w"):
            task = loop.create_task(process())
        await task

    fault = Fault(at(PointKind.TURN, "w", 1), FaultKind.CRASH, "w")
    play(main, (fault,), lambda struck: seen.append(str(struck)))
    assert seen == ["turn 0", "crash w at turn 1 of w", "turn 1", "turn 2"]


def test_a_process_whose_clock_is_fast_waits_less_and_its_armed_timers_follow() -> None:
    async def process(loop: FaultLoop) -> tuple[float, float]:
        begun = loop.time()
        await asyncio.sleep(10)
        return begun, loop.time()

    async def main(loop: FaultLoop) -> None:
        loop.set_clock("w", ahead_s=100, rate=2.0)
        with within("w"):
            task = loop.create_task(process(loop))
        await asyncio.sleep(2)  # 4 of its 10 seconds are over
        loop.set_clock("w", ahead_s=0, rate=0.5)
        assert await task == (100, 110)
        assert loop.time() == 2 + 12

    play(main)


@pytest.mark.parametrize("rate", [0.9, 1.0371, 1.1])
def test_who_sleeps_the_rest_of_a_span_comes_to_its_end_by_any_clock(rate: float) -> None:
    async def process(loop: FaultLoop) -> int:
        deadline, num_sleeps = loop.time() + 1.1, 0
        while loop.time() < deadline:
            await asyncio.sleep(deadline - loop.time())
            num_sleeps += 1
        return num_sleeps

    async def main(loop: FaultLoop) -> None:
        await asyncio.sleep(1 / 3)
        loop.set_clock("w", ahead_s=777.7, rate=rate)
        with within("w"):
            task = loop.create_task(process(loop))
        assert await task <= 3

    play(main)


def test_a_late_timer_is_late_by_true_time() -> None:
    async def main(loop: FaultLoop) -> None:
        with within("w"):
            await asyncio.sleep(1)
        assert loop.time() == 3.5

    play(main, (Fault(at(PointKind.TIMER, "w", 0), FaultKind.LATE, for_s=2.5),))


# --- the network ------------------------------------------------------------------------------------------------


class Net:
    """Two processes `a` and `b` on a network; `b` notes what it is called with."""

    def __init__(self, plan: Plan) -> None:
        self.served: list[str] = []
        self.network = FaultyNetwork(LinkTimes(0.001, 1e12), EventLog(), Points(plan, lambda _: None))
        self.caller: Port[WorkerSides] = self.network.attach("a:1", "a", "1", None)
        self.network.attach("b:1", "b", "1", self)  # pyright: ignore[reportArgumentType]

    async def call(self, word: str, timeout_s: float = 100.0) -> None:
        async def work(_: WorkerSides) -> None:
            self.served.append(word)

        await self.network.call(self.caller, "b:1", "1", "submit", work, timeout_s)

    async def stream(self, num_items: int) -> list[int]:
        async def items(_: WorkerSides) -> AsyncGenerator[int]:
            for item in range(num_items):
                yield item

        got: list[int] = []
        async for item in self.network.stream(self.caller, "b:1", "1", "subscribe", items, lambda _: 1):
            got.append(item)
        return got


def on_net(plan: Plan, scene: Callable[[Net, FaultLoop], Coroutine[None, None, None]]) -> None:
    async def main(loop: FaultLoop) -> None:
        await scene(Net(plan), loop)

    play(main)


def test_a_message_is_overtaken_by_the_next_one_on_its_link() -> None:
    async def scene(net: Net, _: FaultLoop) -> None:
        await asyncio.gather(net.call("first"), net.call("second"))
        assert net.served == ["second", "first"]

    on_net((message("a>b", 0, FaultKind.REORDER),), scene)


def test_a_call_whose_request_or_answer_is_lost_times_out_at_its_caller() -> None:
    async def scene(net: Net, loop: FaultLoop) -> None:
        for word in ("request lost", "answer lost"):
            with pytest.raises(DeadlineExceeded):
                await net.call(word, 2.0)
        assert net.served == ["answer lost"]
        assert loop.time() == 4.0

    on_net((message("a>b", 0, FaultKind.LOSE), message("b>a", 0, FaultKind.LOSE)), scene)


def test_a_call_that_is_doubled_is_served_twice_and_answered_once() -> None:
    async def scene(net: Net, loop: FaultLoop) -> None:
        await net.call("twice")
        assert net.served == ["twice"] and loop.time() < 0.01
        await asyncio.sleep(1)
        assert net.served == ["twice", "twice"]

    on_net((message("a>b", 0, FaultKind.DUPLICATE, 0.5),), scene)


def test_a_stream_keeps_its_order_when_an_item_is_late_and_breaks_when_one_is_lost() -> None:
    async def scene(net: Net, loop: FaultLoop) -> None:
        assert await net.stream(3) == [0, 1, 2]
        assert loop.time() > 5
        with pytest.raises(Unavailable, match="broke"):
            await net.stream(3)

    on_net((message("b>a", 1, FaultKind.DELAY, 5.0), message("b>a", 6, FaultKind.LOSE)), scene)


def test_what_is_sent_over_a_cut_link_comes_when_it_is_mended() -> None:
    async def scene(net: Net, loop: FaultLoop) -> None:
        net.network.cut("a>b")
        net.network.cut("a>b")
        calls = asyncio.gather(net.call("first"), net.call("second"))
        await asyncio.sleep(1)
        net.network.mend("a>b")
        await asyncio.sleep(1)
        assert net.served == [], "it was cut twice"
        net.network.mend("a>b")
        await calls
        assert net.served == ["first", "second"]

    on_net((), scene)


def test_a_corrupt_frame_is_pulled_again() -> None:
    case = Case(scenario(), (message("prefill-0>decode-0", 1, FaultKind.CORRUPT),))
    log = EventLog()
    assert run_case(case, log).violation is None
    assert log.to_bytes().count(b" pull ") == 1 + 1 + 1  # again, and the probe's


# --- a run ------------------------------------------------------------------------------------------------------

OF_A_KIND = {
    FaultKind.CRASH: Fault(at(PointKind.STEP, "decode-0", 3), FaultKind.CRASH, "decode-0", for_s=0.5),
    FaultKind.UNLIST: Fault(at(PointKind.TURN, "gateway-0", 40), FaultKind.UNLIST, "prefill-0", for_s=0.5),
    FaultKind.CANCEL: Fault(at(PointKind.TURN, "decode-0", 30), FaultKind.CANCEL, "r0"),
    FaultKind.CUT: Fault(
        at(PointKind.TURN, "decode-0", 9), FaultKind.CUT, "prefill-0>decode-0", for_s=1.0, how=How.BOTH_WAYS
    ),
    FaultKind.SKEW: Fault(at(PointKind.TURN, "decode-0", 0), FaultKind.SKEW, for_s=500.0, rate=1.1),
    FaultKind.LATE: Fault(at(PointKind.TIMER, "decode-0", 1), FaultKind.LATE, for_s=4.0),
    FaultKind.SLOW: Fault(at(PointKind.STEP, "prefill-0", 0), FaultKind.SLOW, for_s=4.5),
    FaultKind.DELAY: message("prefill-0>decode-0", 0, FaultKind.DELAY, 0.7),
    FaultKind.REORDER: message("gateway-0>prefill-0", 1, FaultKind.REORDER),
    FaultKind.LOSE: message("gateway-0>prefill-0", 1, FaultKind.LOSE),
    FaultKind.DUPLICATE: message("gateway-0>prefill-0", 1, FaultKind.DUPLICATE, 0.01),
    FaultKind.CORRUPT: message("prefill-0>decode-0", 1, FaultKind.CORRUPT),
    FaultKind.FLIP: Fault(at(PointKind.STEP, "decode-0", 2), FaultKind.FLIP, "decode-0"),
    FaultKind.LEAVE: Fault(at(PointKind.STEP, "decode-0", 2), FaultKind.LEAVE, "decode-0", for_s=0.3),
}


@pytest.mark.parametrize("kind", FaultKind)
def test_a_fault_of_each_kind_changes_what_happens_and_breaks_no_promise(kind: FaultKind) -> None:
    calm = run_case(Case(scenario(TWO)))
    assert [how for _, how in calm.ends] == ["finished", "finished"]
    hurt = run_case(Case(scenario(TWO), (OF_A_KIND[kind],)))
    assert hurt.violation is None
    assert hurt.digest != calm.digest
    assert dict(hurt.ends)["r0"] == ("left" if kind is FaultKind.CANCEL else "finished")


@pytest.mark.parametrize("worker", ["prefill-0", "decode-0"])
def test_a_worker_may_crash_at_any_of_its_turns(worker: str) -> None:
    """Also before the gateway is linked to it, in the middle of a transfer, and when all is over."""
    small = scenario((asked("r0", num_own=9, max_tokens=3, num_answers=2),))
    (num_turns,) = (count for place, count in run_case(Case(small)).census.counts if place == ("turn", worker))
    assert num_turns > 10
    for number in range(num_turns):
        fault = Fault(at(PointKind.TURN, worker, number), FaultKind.CRASH, worker, for_s=0.2)
        outcome = run_case(Case(small, (fault,)))
        assert (outcome.violation, dict(outcome.ends)) == (None, {"r0": "finished"}), fault


def test_plans_are_drawn_over_all_kinds_of_points_and_faults() -> None:
    cases = Cases()
    faults = [fault for seed in range(8, 16) for fault in cases.of(seed).plan]
    faults += [fault for seed in range(16, 24) for fault in cases.of(seed).plan]
    assert len({fault.at.kind for fault in faults}) == len(PointKind)
    assert len({fault.kind for fault in faults}) > len(FaultKind) / 2
    assert all(set(ends_of(fault.target)) for fault in faults if fault.kind is FaultKind.CUT)


# --- invariants see what is wrong -------------------------------------------------------------------------------


def engine_at_work() -> Engine:
    """One sequence of 9 tokens in blocks of 4, computed; two of its blocks are full, and named."""
    engine = Engine(scenario().world_spec().engine_spec())
    engine.handle(Add(Request("r", tuple(range(10, 19)), SamplingParams(max_tokens=8))))
    batch = engine.begin()
    assert batch is not None
    engine.finish(batch, [Sampled((7,))])
    return engine


def double_free(engine: Engine) -> None:
    engine.blocks._free.append(engine.scheduler.running[0].block_ids[2])


def forgotten_holder(engine: Engine) -> None:
    engine.blocks._holders[engine.scheduler.running[0].block_ids[0]].clear()


def dead_holder(engine: Engine) -> None:
    engine.scheduler.running.clear()


def wrong_name(engine: Engine) -> None:
    blocks, (first, second, _) = engine.blocks, engine.scheduler.running[0].block_ids
    blocks._hash_of[first], blocks._hash_of[second] = blocks._hash_of[second], blocks._hash_of[first]


def named_too_early(engine: Engine) -> None:
    engine.blocks.name(engine.scheduler.running[0].block_ids[2], b"not full yet")


@pytest.mark.parametrize("mistake", [double_free, forgotten_holder, dead_holder, wrong_name, named_too_early])
def test_a_mistake_in_the_tables_of_an_engine_is_seen(mistake: Callable[[Engine], None]) -> None:
    engine = engine_at_work()
    assert not [*invariants.block_faults(engine), *invariants.sharing_faults(engine)]
    mistake(engine)
    assert [*invariants.block_faults(engine), *invariants.sharing_faults(engine)]


# --- smaller ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guilty", [(), (3,), (0, 7), (1, 2, 6)], ids=str)
def test_only_those_are_left_of_which_none_can_go(guilty: tuple[int, ...]) -> None:
    num_tries = 0

    def fails(pieces: tuple[int, ...]) -> bool:
        nonlocal num_tries
        num_tries += 1
        return all(piece in pieces for piece in guilty)

    assert fewer(tuple(range(8)), fails) == guilty
    assert num_tries < 40
