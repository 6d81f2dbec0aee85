"""The modelled step runner: turns of a real engine, whose steps are delays.

Turns are taken in the order of engine.step_runner.drive, on the running loop. With `plain` tokens, steps that can only
go one way are advanced together (burst.py), until the end of the step in which a command comes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace

from cluster.simulator.burst import Burst, fast_forward, plan_burst
from cluster.simulator.calibration import modelled_calibration
from cluster.simulator.host import Host
from cluster.simulator.log import EventLog
from cluster.simulator.mailbox import Mailbox
from cluster.simulator.plain import PlainTokens
from cluster.simulator.service_times.model import ServiceTimes
from engine.engine import Engine, ModelRunner
from engine.errors import WorkerLost
from engine.layer_groups import LayerNews
from engine.scheduler import Batch
from engine.sequence import Sequence
from engine.step_runner import begin_calibrated, begin_turn
from engine.step_shape import StepRecord, StepShape
from engine.types import Add, Adopt, Command, EngineStats, StepOutputs

Patience = Callable[[Sequence], float]


@dataclass(frozen=True, slots=True)
class Model:
    """What a modelled engine computes, and how long it takes."""

    runner: ModelRunner
    times: ServiceTimes
    plain: PlainTokens | None = None  # the runner, if steps may be advanced together
    host: Host | None = None  # shared with other workers, whose steps may change how long ours take


class ModelledStepRunner:
    """Implements engine.step_runner.StepRunner. `patience`: until when a sequence's client waits for its tokens."""

    def __init__(self, name: str, engine: Engine, model: Model, log: EventLog, patience: Patience) -> None:
        self._name = name
        self._engine = engine
        self._model = model
        self._log = log
        self._patience = patience
        self.num_steps = 0
        self.num_extrapolated = 0  # beyond what the service times were measured for
        self._told = EngineStats()
        self._last_end = 0.0  # of single steps
        self._burst: Burst | None = None  # that lasts, or the last one
        self._alarm: _Alarm | None = None  # for the end of the burst that lasts
        self._commands: Mailbox[Command] = Mailbox()
        self._outputs: Mailbox[StepOutputs | Exception] = Mailbox()
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._run(), name=f"engine of {name}")

    def send(self, command: Command) -> None:
        self._commands.put(command)
        if self._alarm is not None and self._burst is not None:
            self._alarm.set(self._burst.ends[min(self._burst.num_ended(self._loop.time()), len(self._burst.ends) - 1)])

    async def outputs(self) -> StepOutputs:
        item = await self._outputs.get()
        if isinstance(item, Exception):
            raise item
        return item

    async def stop(self) -> None:
        self.crash()
        await asyncio.gather(self._task, return_exceptions=True)

    def crash(self) -> None:
        """The engine is gone at once, in the middle of its step."""
        self._task.cancel()
        self._outputs.put(WorkerLost("the engine ended"))

    # --- what is known while a burst lasts -------------------------------------------------------------------

    def stats_by(self, told: EngineStats, now: float) -> EngineStats:
        """What was reported by `now`, for someone who last heard `told`."""
        return (self._burst.stats_by(told, now) if self._burst is not None else None) or told

    @property
    def last_end(self) -> float:
        """When the last step ended that has."""
        num_steps = self._burst.num_ended(self._loop.time()) if self._burst is not None else 0
        return max(self._last_end, self._burst.ends[num_steps - 1] if self._burst is not None and num_steps else 0.0)

    def catch_up(self) -> bool:
        """Let out what the burst has made by now; False if there is nothing."""
        if self._alarm is None or self._burst is None:
            return False
        num_steps = self._burst.num_ended(self._loop.time())
        if not self._burst.num_done < num_steps < len(self._burst.ends):
            return False
        self._go_forward(self._burst, num_steps, goes_on=True)
        return True

    # --- turns -----------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        """A fault of the engine is a bug to be seen, not a crash to recover from: its reader gets it as it is."""
        try:
            await self._drive()
        except Exception as error:
            self._outputs.put(error)

    async def _drive(self) -> None:
        idle = True
        begin_calibrated(self._engine, modelled_calibration(self._engine.spec, self._model.times), self._emit)
        while True:
            commands = await self._take(block=idle)
            batch = begin_turn(self._engine, commands, self._emit)
            idle = batch is None
            if batch is None:
                continue
            is_new = any(isinstance(command, Add | Adopt) for command in commands)  # whose first token goes by itself
            burst = None if is_new else self._plan(batch)
            if burst is not None:
                await self._play(burst)
            else:
                await self._step(batch)

    async def _step(self, batch: Batch) -> None:
        shape = batch.shape
        step_s = self._model.times.step_s(shape)
        self.num_steps += 1
        self.num_extrapolated += self._model.times.extrapolates(shape)
        self._log_step(shape, self._loop.time(), step_s)
        news = self._engine.layer_news(batch)
        if news is None:
            step_s = await self._pass(shape, step_s)
            sampled = self._model.runner.execute(batch)
        else:  # what is told must lie in the pool
            sampled = self._model.runner.execute(batch)
            step_s = await self._pass_layers(shape, step_s, news)
        self._last_end = self._loop.time()
        self._engine.finish(batch, sampled)
        record = StepRecord(shape, step_s)
        self._engine.learn(record)
        self._emit(replace(self._engine.take_outputs(), steps=(record,)))

    async def _pass(self, shape: StepShape, alone_s: float) -> float:
        """Returns when so much of a step is done, with the time that it took."""
        if self._model.host is not None:
            return await self._model.host.compute(shape, alone_s)
        await asyncio.sleep(alone_s)
        return alone_s

    async def _pass_layers(self, shape: StepShape, alone_s: float, news: LayerNews) -> float:
        """The same of a whole step, which tells of its layers. All take equally long."""
        took_s, num_done = 0.0, 0
        for num_layers in news.marks:
            took_s += await self._pass(shape, alone_s * (num_layers - num_done) / news.marks[-1])
            num_done = num_layers
            self._emit(news.at(num_layers))
        return took_s

    async def _take(self, block: bool) -> list[Command]:
        first = [await self._commands.get()] if block else []
        return first + self._commands.take_all()

    def _emit(self, outputs: StepOutputs) -> None:
        self._told = outputs.stats
        self._outputs.put(outputs)

    def _log_step(self, shape: StepShape, begun: float, step_s: float) -> None:
        if self._log.detailed:
            num_sequences = len(shape.chunks) + shape.num_decoding
            num_tokens = shape.num_chunk_tokens + shape.num_decoding
            self._log.add(self._name, "step", at=begun, sequences=num_sequences, tokens=num_tokens, step_s=step_s)

    # --- bursts ----------------------------------------------------------------------------------------------

    def _plan(self, batch: Batch) -> Burst | None:
        if self._model.plain is None or self._model.host is not None or self._commands:
            return None
        until = min(self._patience(item.sequence) for item in batch.scheduled)
        return plan_burst(self._engine, batch, self._model.times, self._told, self._loop.time(), until)

    async def _play(self, burst: Burst) -> None:
        self._burst, self._alarm = burst, _Alarm(self._loop)
        try:
            self._alarm.set(burst.ends[-1])
            await self._alarm.rings
        except asyncio.CancelledError:  # in the midst of a step, which has begun
            self._note_steps(burst, burst.num_done, min(burst.num_ended(self._loop.time()) + 1, len(burst.ends)))
            raise
        finally:
            self._alarm.cancel()
            self._alarm = None
        num_steps = burst.num_ended(self._loop.time())
        del burst.ends[num_steps:]
        self._go_forward(burst, num_steps, goes_on=False)

    def _go_forward(self, burst: Burst, num_steps: int, goes_on: bool) -> None:
        assert self._model.plain is not None
        first = burst.num_done
        tokens = fast_forward(self._engine, burst, num_steps, self._model.plain.tokens, goes_on)
        self._note_steps(burst, first, num_steps)
        last = StepRecord(burst.shape_of(num_steps - 1), burst.steps_s[num_steps - 1])  # tells what the others would
        self._emit(StepOutputs(tokens, stats=burst.stats_after(num_steps), steps=(last,)))

    def _note_steps(self, burst: Burst, first: int, stop: int) -> None:
        self.num_steps += stop - first
        self.num_extrapolated += self._num_extrapolated(burst, range(first, stop))
        for index in range(first, stop) if self._log.detailed else ():
            begun = burst.ends[index - 1] if index else burst.begun
            self._log_step(burst.shape_of(index), begun, burst.steps_s[index])

    def _num_extrapolated(self, burst: Burst, steps: range) -> int:
        """Contexts only grow: where neither the first nor the last is beyond the measured range, none is."""
        extrapolates = self._model.times.extrapolates
        if not any(extrapolates(burst.shape_of(index)) for index in (steps[0], steps[-1])):
            return 0
        return sum(extrapolates(burst.shape_of(index)) for index in steps)


class _Alarm:
    """`rings` is done at the earliest of the times that were set."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.rings: asyncio.Future[None] = loop.create_future()
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None

    def set(self, when: float) -> None:
        if self._timer is None or when < self._timer.when():
            self.cancel()
            self._timer = self._loop.call_at(when, self._ring)

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _ring(self) -> None:
        if not self.rings.done():
            self.rings.set_result(None)
