"""Modelled steps: which tokens a step gives, and a step runner whose steps are delays.

The tokens come out of KV, as a real model's do: the state of a position is a digest of its token, of the state before
and of one earlier state that the one before chooses, all read from the pool's blocks. By induction it is a pure
function of the tokens so far; but a block that was lost, mixed up or never moved gives other tokens.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from collections.abc import Sequence as TokenIds
from dataclasses import dataclass, replace

from cluster.simulator.host import Host
from cluster.simulator.log import EventLog
from cluster.simulator.pool import STATE_BYTES, StatePool
from cluster.simulator.service_times.model import ServiceTimes
from engine.engine import Engine, ModelRunner
from engine.errors import WorkerLost
from engine.scheduler import Batch, Scheduled
from engine.step_runner import begin_turn
from engine.step_shape import StepRecord
from engine.types import Command, Request, Sampled, SamplingParams, StepOutputs


@dataclass(frozen=True, slots=True)
class ModelledWeights:
    """The model that all workers serve, as pure functions. `eos_every`: about one token in so many ends the sequence
    (0: none does)."""

    seed: int
    vocab_size: int
    eos_token_ids: frozenset[int] = frozenset()
    eos_every: int = 0

    def next_state(self, position: int, token_id: int, state_of: Callable[[int], bytes]) -> bytes:
        """The state of a position, from those before it."""
        before = state_of(position - 1) if position else bytes(STATE_BYTES)
        earlier = state_of(int.from_bytes(before[:8], "little") % position) if position else b""
        data = before + earlier + token_id.to_bytes(4, "little")
        return hashlib.blake2b(data, digest_size=STATE_BYTES, salt=(self.seed % 2**64).to_bytes(8, "little")).digest()

    def next_token(self, state: bytes, sampling: SamplingParams) -> int:
        """The token after the position of this state."""
        salt = sampling.seed.to_bytes(8, "little") + sampling.choice.to_bytes(8, "little")
        drawn = hashlib.blake2b(state, digest_size=16, salt=salt).digest()
        token_id = int.from_bytes(drawn[:8], "little") % self.vocab_size
        if self.eos_every and int.from_bytes(drawn[8:], "little") % self.eos_every == 0:
            return min(self.eos_token_ids)
        while token_id in self.eos_token_ids:
            token_id = (token_id + 1) % self.vocab_size
        return token_id

    def continuation(self, request: Request) -> tuple[int, ...]:
        """The tokens of a request that nothing but its length or an end-of-sequence token ends, without any engine."""
        tokens, states = list(request.prompt_ids), list[bytes]()
        num_prompt, sampling = len(tokens), request.sampling
        while len(tokens) - num_prompt < sampling.max_tokens:
            for position in range(len(states), len(tokens)):
                states.append(self.next_state(position, tokens[position], states.__getitem__))
            tokens.append(self.next_token(states[-1], sampling))
            if tokens[-1] in self.eos_token_ids and not sampling.ignore_eos:
                break
        return tuple(tokens[num_prompt:])


class ModelledRunner:
    """Implements engine.engine.ModelRunner over a pool of states."""

    def __init__(self, weights: ModelledWeights, pool: StatePool) -> None:
        self._weights = weights
        self._pool = pool

    def execute(self, batch: Batch) -> list[Sampled]:
        for source, target in batch.copies:
            self._pool.copy(source, target)
        return [self._compute(item) for item in batch.scheduled]

    def _compute(self, item: Scheduled) -> Sampled:
        tokens: TokenIds[int] = item.sequence.tokens
        blocks = item.sequence.tables[0]
        state = b""
        for position in range(item.start, item.start + item.num_new):
            state = self._weights.next_state(position, tokens[position], lambda at: self._pool.state(blocks, at))
            self._pool.store(blocks, position, state)
        if not item.samples:
            return Sampled()
        first, *siblings = (Sampled((self._weights.next_token(state, one.sampling),)) for one in item.sequence.answers)
        return replace(first, siblings=tuple(siblings))


class ModelledStepRunner:
    """Turns in the order of engine.step_runner.drive, on the running loop. Implements engine.step_runner.StepRunner."""

    def __init__(
        self, name: str, engine: Engine, model: ModelRunner, times: ServiceTimes, log: EventLog,
        host: Host | None = None,
    ) -> None:  # fmt: skip
        """`host`: shared with other workers; without, nobody slows a step down."""
        self._host = host
        self._name = name
        self._engine = engine
        self._model = model
        self._times = times
        self._log = log
        self.num_steps = 0
        self.num_extrapolated = 0  # beyond what the service times were measured for
        self._commands: asyncio.Queue[Command] = asyncio.Queue()
        self._outputs: asyncio.Queue[StepOutputs | Exception] = asyncio.Queue()
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"engine of {name}")

    def send(self, command: Command) -> None:
        self._commands.put_nowait(command)

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
        self._outputs.put_nowait(WorkerLost("the engine ended"))

    async def _run(self) -> None:
        """A fault of the engine is a bug to be seen, not a crash to recover from: its reader gets it as it is."""
        try:
            await self._drive()
        except Exception as error:
            self._outputs.put_nowait(error)

    async def _drive(self) -> None:
        idle = True
        while True:
            batch = begin_turn(self._engine, await self._take(block=idle), self._outputs.put_nowait)
            idle = batch is None
            if batch is not None:
                shape = batch.shape
                step_s = self._times.step_s(shape)
                self.num_steps += 1
                self.num_extrapolated += self._times.extrapolates(shape)
                self._log.add(
                    self._name, "step", sequences=len(batch.scheduled), tokens=batch.num_tokens, step_s=step_s
                )
                if self._host is None:
                    await asyncio.sleep(step_s)
                else:
                    step_s = await self._host.compute(shape, step_s)
                self._engine.finish(batch, self._model.execute(batch))
                self._outputs.put_nowait(replace(self._engine.take_outputs(), step=StepRecord(shape, step_s)))

    async def _take(self, block: bool) -> list[Command]:
        taken = [await self._commands.get()] if block else []
        while not self._commands.empty():
            taken.append(self._commands.get_nowait())
        return taken
