"""Step runners: the same engine in a thread and in a process of its own, and how each of them ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import pytest

from engine.build import BuiltEngine, build_engine
from engine.config import EngineConfig, ModelSource
from engine.errors import ModelError, WorkerLost
from engine.layer_groups import LayersStored
from engine.pool import SharedPool
from engine.scheduler import Batch
from engine.setup import EngineSetup, plan_engine
from engine.step_runner import LENGTH, ProcessStepRunner, StepRunner, ThreadStepRunner, drive
from engine.step_shape import Chunk, StepShape
from engine.types import Abort, Add, Command, FinishReason, Key, Reserve, Sampled, StepOutputs
from tests.engine.tiny import request

IDLE_S = 0.5  # far more than a step of the tiny model takes
EMIT_S = 0.01
TIMEOUT_S = 120.0  # a child imports torch on a machine that may be busy
ROOT = Path(__file__).parents[2]


@pytest.fixture
def setup(tiny_llama: Callable[..., tuple[object, Path]]) -> EngineSetup:
    """A tiny model on disk, ready to be built here or in a child."""
    _, folder = tiny_llama()
    config = EngineConfig(num_blocks=64, block_size=4, prefill_chunk=16, max_batch_tokens=32)
    return plan_engine(ModelSource(name=str(folder)), config, hash_key=b"key")


REQUESTS = [
    request("greedy", range(3, 40), max_tokens=12, ignore_eos=True),
    request("seeded", range(50, 60), max_tokens=20, temperature=0.9, top_p=0.9, seed=7, ignore_eos=True),
    request("short", [9], max_tokens=3, ignore_eos=True),
]


async def generate(runner: StepRunner) -> dict[Key, list[int]]:
    """Send all requests and gather their tokens, until each has finished."""
    tokens: dict[Key, list[int]] = {item.key: [] for item in REQUESTS}
    finished: set[Key] = set()
    for item in REQUESTS:
        runner.send(Add(item))
    async with asyncio.timeout(TIMEOUT_S):
        while finished != tokens.keys():
            for output in (await runner.outputs()).tokens:
                assert output.first_index == len(tokens[output.key])
                tokens[output.key] += output.token_ids
                if output.finish:
                    assert output.finish is FinishReason.LENGTH
                    finished.add(output.key)
    return tokens


async def next_outputs(runner: StepRunner, wanted: Callable[[StepOutputs], object]) -> StepOutputs:
    async with asyncio.timeout(TIMEOUT_S):
        while not wanted(outputs := await runner.outputs()):
            pass
    return outputs


def descriptors() -> list[str]:
    """What this process has open, without what the look itself opens."""
    links = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/self/fd/{name}"))
    return sorted(link for link in links if not link.startswith("/proc/"))


# --- a thread -------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def thread_runner(built: BuiltEngine, model=None) -> AsyncGenerator[ThreadStepRunner]:
    runner = ThreadStepRunner(built.engine, model or built.runner)
    try:
        yield runner
    finally:
        await runner.stop()


async def test_a_stopped_thread_is_gone_and_says_so(setup: EngineSetup) -> None:
    async with thread_runner(build_engine(setup, None)) as runner:
        await generate(runner)
    assert not [thread for thread in threading.enumerate() if thread.name == "engine"]
    with pytest.raises(WorkerLost):
        await next_outputs(runner, lambda outputs: False)


async def test_a_fault_of_the_model_is_the_end_of_the_engine_and_is_told(setup: EngineSetup) -> None:
    class Broken:
        def execute(self, batch: Batch, stored: LayersStored | None = None) -> list[Sampled]:
            raise RuntimeError("out of memory")

    async with thread_runner(build_engine(setup, None), Broken()) as runner:
        runner.send(Add(REQUESTS[0]))
        with pytest.raises(WorkerLost, match="out of memory"):
            await next_outputs(runner, lambda outputs: False)


async def test_commands_are_answered_while_nothing_is_computed(setup: EngineSetup) -> None:
    async with thread_runner(build_engine(setup, None)) as runner:
        runner.send(Reserve(Key("a", 0), 7))
        outputs = await next_outputs(runner, lambda outputs: outputs.reserved)
        assert outputs.reserved[0].block_ids is not None
        assert outputs.stats.num_held_blocks == 2
        assert outputs.steps == ()


async def test_an_abort_ends_a_request_between_two_steps(setup: EngineSetup) -> None:
    async with thread_runner(build_engine(setup, None)) as runner:
        endless = request("endless", [5], max_tokens=200, ignore_eos=True)
        runner.send(Add(endless))
        first = await next_outputs(runner, lambda outputs: outputs.tokens)
        (step,) = first.steps
        assert step.shape == StepShape((Chunk(0, 1),))
        assert step.step_s > 0
        runner.send(Abort(endless.key))
        last = await next_outputs(runner, lambda outputs: outputs.tokens and outputs.tokens[0].finish)
        assert last.tokens[0].finish is FinishReason.ABORT


def test_steps_that_follow_each_other_add_up_to_the_time_that_passed(setup: EngineSetup) -> None:
    """What a turn costs outside of its step, here a slow reader of its outputs, is in the next step's duration; what
    the engine waited before the first is in none."""
    built, seen = build_engine(setup, None), list[StepOutputs]()
    emitted: list[float] = []

    class Late:
        has_news = False

        def __init__(self) -> None:
            self.turns: list[list[Command] | None] = [[Add(REQUESTS[0])], None]

        def take(self, block: bool) -> list[Command] | None:
            if block:
                time.sleep(IDLE_S)
                return self.turns.pop(0)
            return []

    def emit(outputs: StepOutputs) -> None:
        if outputs.steps:
            emitted.append(time.perf_counter())
            seen.append(outputs)
            time.sleep(EMIT_S)

    drive(built.engine, built.runner, Late(), emit)
    durations = [step.step_s for outputs in seen for step in outputs.steps]
    assert [len(outputs.tokens) for outputs in seen] == [0, 0] + [1] * 12  # three chunks, the last with a token
    assert min(durations[1:]) >= EMIT_S
    assert durations[0] < IDLE_S
    assert sum(durations[1:]) == pytest.approx(emitted[-1] - emitted[0], abs=0.01)


# --- a process ------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def process_runner(setup: EngineSetup) -> AsyncGenerator[tuple[ProcessStepRunner, SharedPool]]:
    pool = SharedPool(setup.layout, setup.spec.num_blocks)
    try:
        runner = await ProcessStepRunner.start(setup, pool, TIMEOUT_S)
        try:
            yield runner, pool
        finally:
            await runner.stop()
    finally:
        pool.close()


async def test_a_process_gives_the_tokens_of_a_thread_and_leaves_nothing_behind(setup: EngineSetup) -> None:
    async with thread_runner(build_engine(setup, None)) as thread:
        wanted = await generate(thread)
    before = descriptors()
    async with process_runner(setup) as (runner, pool):
        assert await generate(runner) == wanted
        assert runner.pid != os.getpid()
        assert any(bytes(pool.memory)), "the child's KV lies in memory that we see"
        assert os.readlink(f"/proc/self/fd/{pool.fd}") == "/memfd:steelyard-kv (deleted)"
    assert_reaped(runner.pid)
    await asyncio.sleep(0)  # the closed transport lets go of its socket
    assert descriptors() == before
    assert not [name for name in os.listdir("/dev/shm") if "steelyard" in name]


async def test_a_killed_process_is_a_lost_worker(setup: EngineSetup) -> None:
    before = descriptors()
    async with process_runner(setup) as (runner, _):
        runner.send(Add(request("endless", [5], max_tokens=200, ignore_eos=True)))
        await next_outputs(runner, lambda outputs: outputs.tokens)
        os.kill(runner.pid, signal.SIGKILL)
        with pytest.raises(WorkerLost, match=str(runner.pid)):
            await next_outputs(runner, lambda outputs: False)
        with pytest.raises(WorkerLost):
            await runner.outputs()
        runner.send(Abort(Key("endless", 0)))  # nobody is there; no error
    assert_reaped(runner.pid)
    await asyncio.sleep(0)
    assert descriptors() == before


async def test_a_model_that_the_child_cannot_load_is_an_error_that_names_the_file(setup: EngineSetup) -> None:
    (weights,) = setup.files.weight_files
    weights.write_bytes(weights.read_bytes()[:-100])  # after it was found whole
    before = descriptors()
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        async with process_runner(setup):
            pass
    await asyncio.sleep(0)
    assert descriptors() == before


async def test_a_child_that_is_not_ready_in_time_is_ended(setup: EngineSetup) -> None:
    before = descriptors()
    pool = SharedPool(setup.layout, setup.spec.num_blocks)
    with pytest.raises(TimeoutError):
        await ProcessStepRunner.start(setup, pool, timeout_s=0.05)
    pool.close()
    await asyncio.sleep(0)
    assert descriptors() == before
    assert_no_child_runs()


@pytest.mark.parametrize("moment", ["before its setup", "in the middle of its work"])
def test_a_child_ends_by_itself_and_quietly_when_the_other_end_is_closed(setup: EngineSetup, moment: str) -> None:
    """Which also happens when its parent dies."""
    pool = SharedPool(setup.layout, setup.spec.num_blocks)
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "engine.process", str(theirs.fileno()), str(pool.fd)]
    child = subprocess.Popen(command, pass_fds=(theirs.fileno(), pool.fd), cwd=ROOT, stderr=subprocess.PIPE)
    theirs.close()
    with ours, child:
        ours.settimeout(TIMEOUT_S)
        if moment == "in the middle of its work":
            for record in (setup, Add(request("endless", [5], max_tokens=200, ignore_eos=True))):
                data = pickle.dumps(record)
                ours.sendall(LENGTH.pack(len(data)) + data)
            assert ours.recv(1)  # it has begun to answer
        ours.close()
        _, errors = child.communicate(timeout=TIMEOUT_S)
    pool.close()
    assert child.returncode == 0
    assert errors == b""


def assert_reaped(pid: int) -> None:
    """Neither running nor a zombie."""
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def assert_no_child_runs() -> None:
    """No child of ours still runs the engine."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children]
    assert not [command for command in commands if b"engine.process" in command]
