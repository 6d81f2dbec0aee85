"""The clients of a fault run: each sees every token once, in order, and the right one, or hears why not."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from cluster.simulator.faults.scenario import Asked
from cluster.simulator.faults.watch import DEADLINE_PATIENCE_S, Watch
from cluster.simulator.steps import ModelledWeights
from cluster.simulator.world import World
from engine.errors import DeadlineExceeded, SteelyardError
from engine.types import FinishReason, Request, Role, TokenOutput
from router.membership import Member

FINISHED, LEFT = "finished", "left"
# What a client may be told where things go wrong around it; any other code is a fault of ours.
HONEST_CODES = (
    "deadline_exceeded", "frame_corrupt", "lease_lost", "overloaded", "stale_incarnation", "transfer_failed",
    "unavailable", "worker_lost",
)  # fmt: skip


class Client:
    """`ended`: how, once it has: FINISHED, LEFT, or an error's code."""

    def __init__(self, asked: Asked, requests: tuple[Request, ...], weights: ModelledWeights, watch: Watch) -> None:
        self.asked = asked
        self.ended: str | None = None
        self._requests = requests
        self._watch = watch
        self._expected = {one.request_id: weights.continuation(one) for one in requests}
        self._tokens: dict[str, list[int]] = {one.request_id: [] for one in requests}
        self._finished: list[str] = []
        self._cancelled: list[str] = []  # by the gateway
        self._moving: asyncio.Task[None] | None = None

    async def run(self, world: World) -> None:
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        self.ended = LEFT
        try:
            async with aclosing(world.generate(*self._requests)) as outputs:
                async for output in outputs:
                    self._take(output)
                    self._move(world)
                    if self._has_enough:
                        return
            self.ended = FINISHED
            self._check_end()
        except SteelyardError as error:
            self.ended = error.code
            if error.code not in HONEST_CODES:
                self._watch.found("honest errors", f"{self.asked.name} got {error.code}: {error.message}")
            left_s = begun_s + self.asked.timeout_s - loop.time()
            if isinstance(error, DeadlineExceeded) and left_s > DEADLINE_PATIENCE_S:
                self._watch.found("honest errors", f"{self.asked.name} still had time, and got: {error.message}")

    def cancel(self, world: World, name: str) -> None:
        """The gateway wants no more of one answer, as when a stop string is found in it."""
        self._cancelled.append(name)
        world.dispatcher.cancel(name)

    def _move(self, world: World) -> None:
        """To another decode worker, once, while the stream goes on."""
        wanted, name = self.asked.moves_after, self.asked.name
        if wanted is None or self._moving is not None or len(self._tokens[name]) <= wanted:
            return
        here = next((one.worker for one in world.dispatcher.moves.generating() if one.request_id == name), None)
        others = [one.member for one in world.dispatcher.loads() if one.member.role is Role.DECODE]
        target = next((one for one in others if one != here), None)
        if here is not None and target is not None:
            self._moving = asyncio.get_running_loop().create_task(self._move_to(world, target), name=f"move of {name}")

    def let_go(self) -> None:
        """Of its order to move, to which no answer may ever come."""
        if self._moving is not None:
            self._moving.cancel()

    async def _move_to(self, world: World, target: Member) -> None:
        try:
            await world.dispatcher.moves.migrate(self.asked.name, target)
        except SteelyardError as error:
            if error.code not in (*HONEST_CODES, "invalid_request"):
                self._watch.found("honest errors", f"the move of {self.asked.name} got {error.code}: {error.message}")

    @property
    def _has_enough(self) -> bool:
        num_tokens = sum(map(len, self._tokens.values()))
        return self.asked.leaves_after is not None and num_tokens >= self.asked.leaves_after

    def _take(self, output: TokenOutput) -> None:
        name = output.key.request_id
        known = self._tokens[name]
        if name in self._finished:
            self._watch.found("exactly once", f"{name} went on after its end with {output}")
        if output.key.epoch < self._watch.last_epoch(name):
            self._watch.found("no old epoch", f"{output.key} came in epoch {self._watch.last_epoch(name)}")
        if output.finish is not FinishReason.ABORT and output.first_index != len(known):
            self._watch.found("exactly once", f"{name}: token {output.first_index} came where {len(known)} was due")
        known += output.token_ids
        if tuple(known) != self._expected[name][: len(known)]:
            self._watch.found("golden law", f"{name}: {known} are not the first of {self._expected[name]}")
        if output.finish is not None:
            self._finished.append(name)
            self._check_finish(output.finish, name)

    def _check_finish(self, finish: FinishReason, name: str) -> None:
        if finish is FinishReason.ABORT and name in self._cancelled:
            return
        if finish not in (FinishReason.LENGTH, FinishReason.STOP):
            self._watch.found("honest ends", f"{name} ended with {finish}")
        if len(self._tokens[name]) < len(self._expected[name]):
            self._watch.found("golden law", f"{name} ended with {finish} after {len(self._tokens[name])} tokens")

    def _check_end(self) -> None:
        if missing := [name for name in self._tokens if name not in self._finished]:
            self._watch.found("honest ends", f"the stream ended before {', '.join(missing)} had")
