"""Step runners: where an engine's turns happen. Records go in, records come out; nobody else touches the engine.

`drive` is the one loop. A ThreadStepRunner runs it in a thread of this process, a ProcessStepRunner in a process
of its own (engine/process.py), so that gRPC and asyncio work here cannot hold up a step by Python's global lock.
The simulator has a third, whose steps are modelled delays.
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import queue
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol, TypeVar, runtime_checkable

from engine.child import STOP_TIMEOUT_S, child_env, end_child
from engine.engine import Engine, ModelRunner
from engine.errors import ModelError, WorkerLost, error_from_code
from engine.layer_groups import LayerNews, LayersStored
from engine.pool import SharedPool
from engine.rank_pools import RankPools, pools_of
from engine.scheduler import Batch
from engine.setup import EngineSetup
from engine.step_shape import StepRecord, StepShape
from engine.types import Command, ErrorInfo, Sampled, StepOutputs

LENGTH = struct.Struct("<I")
Step = TypeVar("Step")


class StepRunner(Protocol):
    """Drives one engine."""

    def send(self, command: Command) -> None:
        """Queue a command; it takes effect between two steps. Never blocks."""
        ...

    async def outputs(self) -> StepOutputs:
        """The next turn's outputs. Raises WorkerLost once the engine is gone."""
        ...

    async def stop(self) -> None: ...


@runtime_checkable
class AheadRunner(ModelRunner, Protocol[Step]):
    """A model runner that computes beside the processor (engine/device_runner.py)."""

    def launch(self, batch: Batch, stored: LayersStored | None = None, after: Step | None = None) -> Step:
        """Begin a step, and do not wait. after: the step of the same items one position before, whose tokens may still
        be unknown."""
        ...

    def can_follow(self, launched: Step, batch: Batch) -> bool:
        """May `batch` be launched after that before it is collected?"""
        ...

    def collect(self, launched: Step) -> list[Sampled]: ...


class Inbox(Protocol):
    def take(self, block: bool) -> list[Command] | None:
        """Commands that have come, after waiting for one if `block`; None when the engine is to end."""
        ...

    @property
    def has_news(self) -> bool:
        """Would `take` give anything?"""
        ...


def begin_calibrated(
    engine: Engine, calibration: tuple[StepRecord, ...], emit: Callable[[StepOutputs], None]
) -> None:  # fmt: skip
    """What was measured before the first command is known to the engine, and told to its worker."""
    for record in calibration:
        engine.scheduler.slack.pace.learn(record)
    if calibration:
        emit(StepOutputs(stats=engine.stats(), calibration=calibration))


def drive(
    engine: Engine, model: ModelRunner, inbox: Inbox, emit: Callable[[StepOutputs], None],
    calibration: tuple[StepRecord, ...] = (),
) -> None:  # fmt: skip
    """Run turns until the inbox says that it is over. `calibration` goes out before."""
    begin_calibrated(engine, calibration, emit)
    ended: float | None = None  # when the step before was; None: idle, for what waits can only go on after a command
    while (commands := inbox.take(block=ended is None)) is not None:
        begun = time.perf_counter() if ended is None else ended
        batch = begin_turn(engine, commands, emit)
        ended = None
        if batch is not None:
            steps = steps_from(engine, model, batch, inbox, emit)
            for one, shape, sampled in steps:
                engine.finish(one, sampled)
                ended = time.perf_counter()
                record = StepRecord(shape, ended - begun)
                engine.learn(record)
                emit(replace(engine.take_outputs(), steps=(record,)))
                begun = ended


def begin_turn(engine: Engine, commands: list[Command], emit: Callable[[StepOutputs], None]) -> Batch | None:
    """A turn up to its step: what has come is handled, and the news of that goes out before the step is computed."""
    for command in commands:
        engine.handle(command)
    batch = engine.begin()
    if commands or engine.has_outputs:
        emit(engine.take_outputs())
    return batch


def steps_from(
    engine: Engine, model: ModelRunner, batch: Batch, inbox: Inbox, emit: Callable[[StepOutputs], None]
) -> Iterator[tuple[Batch, StepShape, list[Sampled]]]:  # fmt: skip
    """This batch's step; and those after it, launched before its tokens are known, as long as nothing has come in. Each
    with its shape, as it is before the step moves its sequences on."""
    news = engine.layer_news(batch)
    if news is not None or not isinstance(model, AheadRunner):
        yield batch, batch.shape, compute(model, batch, news, emit)
        return
    shape, launched = batch.shape, model.launch(batch)
    while True:
        following = None if inbox.has_news else engine.ahead(batch)
        if following is None or not model.can_follow(launched, following):
            yield batch, shape, model.collect(launched)
            return
        next_shape, next_launched = following.shape, model.launch(following, after=launched)
        yield batch, shape, model.collect(launched)
        batch, shape, launched = following, next_shape, next_launched


def compute(
    model: ModelRunner, batch: Batch, news: LayerNews | None, emit: Callable[[StepOutputs], None]
) -> list[Sampled]:  # fmt: skip
    """Compute a step. What it stores for others is told group of layers by group."""
    if news is None:
        return model.execute(batch)

    def stored(num_layers: int) -> None:
        if num_layers in news.marks:
            emit(news.at(num_layers))

    return model.execute(batch, stored)


class ThreadStepRunner:
    """Turns in a thread of this process."""

    def __init__(self, engine: Engine, model: ModelRunner, calibration: tuple[StepRecord, ...] = ()) -> None:
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._outputs: asyncio.Queue[StepOutputs | BaseException] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        args = (engine, model, calibration)
        self._thread = threading.Thread(target=self._run, args=args, name="engine", daemon=True)
        self._thread.start()

    def send(self, command: Command) -> None:
        self._commands.put(command)

    async def outputs(self) -> StepOutputs:
        item = await self._outputs.get()
        if isinstance(item, BaseException):
            raise WorkerLost(f"the engine ended: {item!r}")
        return item

    async def stop(self) -> None:
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join, STOP_TIMEOUT_S)

    @property
    def has_news(self) -> bool:
        return not self._commands.empty()

    def take(self, block: bool) -> list[Command] | None:
        taken: list[Command] = []
        while not self._commands.empty() or (block and not taken):
            command = self._commands.get()
            if command is None:
                return None
            taken.append(command)
        return taken

    def _run(self, engine: Engine, model: ModelRunner, calibration: tuple[StepRecord, ...]) -> None:
        end: BaseException = RuntimeError("stopped")
        try:
            drive(engine, model, self, self._emit, calibration)
        except Exception as error:
            end = error
        with contextlib.suppress(RuntimeError):  # the loop may be closed already
            self._loop.call_soon_threadsafe(self._outputs.put_nowait, end)

    def _emit(self, outputs: StepOutputs) -> None:
        self._loop.call_soon_threadsafe(self._outputs.put_nowait, outputs)


class ProcessStepRunner:
    """Turns in a child process that shares the KV pool; the two talk over a socket pair."""

    def __init__(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def start(cls, setup: EngineSetup, pool: SharedPool | RankPools, timeout_s: float) -> ProcessStepRunner:
        """Start the child and wait until its model is loaded, on every rank. Raises ModelError or WorkerLost."""
        ours, theirs = socket.socketpair()
        with theirs:
            fds = (theirs.fileno(), *(one.fd for one in pools_of(pool)))
            command = [sys.executable, "-m", "engine.process", *map(str, fds)]
            env = child_env(setup.config.threads) | {"GLOO_SOCKET_IFNAME": "lo"}  # where its ranks meet
            process = await asyncio.to_thread(subprocess.Popen, command, pass_fds=fds, env=env)
        reader, writer = await asyncio.open_connection(sock=ours)
        runner = cls(process, reader, writer)
        try:
            async with asyncio.timeout(timeout_s):
                await runner._hand_over(setup)
        except BaseException:
            await runner.stop()
            raise
        return runner

    def send(self, command: Command) -> None:
        self._write(command)

    async def outputs(self) -> StepOutputs:
        item = await self._read()
        assert isinstance(item, StepOutputs)
        return item

    @property
    def pid(self) -> int:
        return self._process.pid

    async def stop(self) -> None:
        await end_child(self._process, self._writer)

    async def _hand_over(self, setup: EngineSetup) -> None:
        self._write(setup)
        answer = await self._read()
        if isinstance(answer, ErrorInfo):
            raise error_from_code(answer.code, answer.message) if answer.code else ModelError(answer.message)

    def _write(self, record: object) -> None:
        data = pickle.dumps(record, protocol=pickle.HIGHEST_PROTOCOL)
        self._writer.write(LENGTH.pack(len(data)) + data)

    async def _read(self) -> object:
        try:
            (length,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
            return pickle.loads(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            raise WorkerLost(f"the engine's process {self._process.pid} ended") from None
