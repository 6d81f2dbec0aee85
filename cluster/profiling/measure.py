"""Measures a live cluster of one prefill and one decode worker.

1. a few prompts warm the cluster up and show how fast it is; the plan follows from that;
2. a round: prompts one at a time, several at once, decode batches over contexts, and both workers at the same time;
3. rounds until the next would pass the time that is given, at least one.

Steps are the workers' own records, read from the gateway; the client's clock is only for what is outside of steps.
Prompts are random ids that every vocabulary has, so none is in a cache unless it shall be.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from itertools import pairwise

from cluster.client import ApiError
from cluster.profiling.held import HeldStreams
from cluster.profiling.live import LiveCluster, Served
from cluster.profiling.observed import Observed, Probe
from cluster.profiling.plan import Plan, make_plan
from engine.step_shape import StepRecord, StepShape, decode_shape
from engine.types import Role
from router.api import HealthView

BUDGET_S = 110.0
MAX_ROUNDS = 8  # more tell little more
WARM_TOKENS = 128
NUM_WARM = 3
ID_RANGE = (20, 250)  # below are often special tokens; every vocabulary has more than 256
POLL_S = 0.05
QUIET_S = 4.0  # a canary, or what was just aborted, is gone within this; workers tell at least once a second
STEP_PATIENCE_S = 10.0  # for one step of the batch that is waited for
WAVE = 4  # streams opened together: their prompts are cached, their transfers are not
HELD_TOKENS = 2048  # of a stream that is held: more than it is held for
PACE_TOKENS = 10  # of an answer that shows what a token takes outside of its step

NOT_ALONE = "its workers computed something else all the time: a profile needs the cluster for itself"

Report = Callable[[str, float], None]  # what is being done, and how much of the time has passed, 0 to 1


async def measure(
    cluster: LiveCluster, report: Report, plan: Plan | None = None, budget_s: float = BUDGET_S
) -> tuple[Served, Observed]:
    """Raises ApiError when nothing listens there, when it is not one worker of each role, or when it serves others too.

    `plan`, if not what suits the cluster's speed; `budget_s`: no round is begun that would probably end later."""
    begun = time.perf_counter()
    served = await cluster.served()
    await ensure_quiet(cluster)
    report("warming up", 0.0)
    session = _Session(cluster, served, plan)
    await session.warm_up()
    for number in range(1, MAX_ROUNDS + 1):
        round_begun = time.perf_counter()
        for name, part in session.parts():
            report(f"round {number}: {name}", min(1.0, (time.perf_counter() - begun) / budget_s))
            await part()
            await ensure_quiet(cluster)
        now = time.perf_counter()
        if now + (now - round_begun) > begun + budget_s:
            break
    if not any(probe.num_decoded == 1 for probe in session.observed.probes):
        raise ApiError(NOT_ALONE)
    return served, session.observed


async def ensure_quiet(cluster: LiveCluster) -> None:
    """Returns when nothing runs any more. Raises ApiError when requests of others do not end soon."""
    deadline = time.perf_counter() + QUIET_S
    while num_running := _num_running(await cluster.health()):
        if time.perf_counter() > deadline:
            raise ApiError(f"it is serving {num_running} other requests: a profile needs the cluster for itself")
        await asyncio.sleep(POLL_S)


def _num_running(health: HealthView) -> int:
    """As the gateway sees it, or the workers, who may still be at what it has aborted."""
    return max(health.num_live_requests, sum(worker.num_running + worker.num_waiting for worker in health.workers))


class _Session:
    """One profile under way."""

    def __init__(self, cluster: LiveCluster, served: Served, plan: Plan | None) -> None:
        self.observed = Observed()
        self._cluster = cluster
        self._served = served
        self._random = random.Random()
        self._long: list[int] = []  # the round's longest prompt
        self._given_plan = plan

    async def warm_up(self) -> None:
        """What is observed here does not count. A canary may cross one of the prompts, not all."""
        for _ in range(NUM_WARM):
            await self._probe(self._new_prompt(WARM_TOKENS), 2)
        if not self.observed.probes:
            raise ApiError(NOT_ALONE)
        warm = self.observed.probes[-1]
        speed = warm.prefill_s / WARM_TOKENS, warm.decode_s
        self._plan = self._given_plan or make_plan(self._served.max_context, *speed)
        self.observed = Observed()

    def parts(self) -> list[tuple[str, Callable[[], Awaitable[None]]]]:
        """A round, in order."""
        decoding = [
            (f"decoding after {context} tokens", partial(self._decode, context)) for context in self._plan.contexts
        ]
        return [("prompts", self._prompts), ("prompts at once", self._prompts_at_once), *decoding]

    # --- parts ---------------------------------------------------------------------------------------------

    async def _prompts(self) -> None:
        """One at a time: the longest first, for those that begin like it."""
        plan = self._plan
        self._long = self._new_prompt(plan.longest)
        await self._probe(self._long, 2)
        for num_tokens in plan.prompts[:-1]:
            await self._probe(self._new_prompt(num_tokens), 2)
        for num_cached, num_new in plan.cached:
            await self._probe(self._long[:num_cached] + self._new_prompt(num_new), 2)

    async def _prompts_at_once(self) -> None:
        """Steps of several chunks, and steps of prompts that follow each other without a pause."""
        await self._cluster.new_steps()
        await self._answer_prompts([self._plan.at_once], count=4, at_a_time=4, num_tokens=1)
        await self._answer_prompts(self._plan.beside, self._plan.num_beside, at_a_time=2, num_tokens=1)
        self.observed.alone += [step.record for step in await self._cluster.new_steps() if step.role is Role.PREFILL]

    async def _decode(self, context: int) -> None:
        """As many streams as the largest batch has, then ever fewer of them."""
        plan, prompt = self._plan, self._long[:context]
        await self._probe(prompt, PACE_TOKENS)
        num_held = min(HELD_TOKENS, self._served.max_context - context)
        async with HeldStreams(partial(self._cluster.answer, self._served.model, prompt, num_held)) as streams:
            await self._open(streams, plan.batch_sizes[0])
            for size in [size for size in plan.batch_sizes if size <= len(streams)]:
                await streams.keep(size)
                met = await self._follow(
                    streams, lambda shape, size=size: is_decode_of(shape, size), plan.num_steps + 1
                )
                self.observed.alone += met[1:]  # the first one's turn began with the end of other streams
                if size == plan.batch_beside and context == plan.contexts[1]:
                    await self._beside()

    async def _beside(self) -> None:
        """Prompts without a pause while a batch decodes; each is handed over and decoded for one step."""
        await self._cluster.new_steps()
        await self._answer_prompts(self._plan.beside, self._plan.num_beside, at_a_time=2, num_tokens=2)
        steps = await self._cluster.new_steps()
        self.observed.beside += [step.record for step in steps]

    # --- means ---------------------------------------------------------------------------------------------

    async def _probe(self, prompt: Sequence[int], num_tokens: int) -> None:
        """One request alone. Its times count if all steps that were computed meanwhile were its own."""
        await self._cluster.new_steps()
        times = await self._cluster.answer(self._served.model, prompt, num_tokens)
        steps = await self._cluster.new_steps()
        prefill = [step.record for step in steps if step.role is Role.PREFILL]
        decode = [step.record for step in steps if step.role is Role.DECODE]
        self.observed.alone += [*prefill, *decode]
        contexts = range(len(prompt) + 1, len(prompt) + num_tokens)
        if covers(prefill, len(prompt)) and [one.shape for one in decode] == [decode_shape([at]) for at in contexts]:
            prefill_s, decode_s = (sum(record.step_s for record in records) for records in (prefill, decode))
            late_bytes = self._served.kv_token_bytes * prefill[-1].shape.num_chunk_tokens
            self.observed.probes.append(Probe(times.first_s, times.end_s, prefill_s, decode_s, len(decode), late_bytes))

    async def _answer_prompts(self, lengths: Sequence[int], count: int, at_a_time: int, num_tokens: int) -> None:
        """`count` new prompts of these lengths in turn, in a closed loop."""
        prompts = [self._new_prompt(lengths[index % len(lengths)]) for index in range(count)]

        async def client() -> None:
            while prompts:
                await self._cluster.answer(self._served.model, prompts.pop(), num_tokens)

        await asyncio.gather(*(client() for _ in range(at_a_time)))

    async def _open(self, streams: HeldStreams, count: int) -> None:
        """So many streams, or as many as there is room for."""
        while len(streams) < count:
            streams.open(min(WAVE, count - len(streams)))
            if not await self._follow(streams, lambda shape: shape.num_decoding >= len(streams), 1):
                return

    async def _follow(self, streams: HeldStreams, wanted: Callable[[StepShape], bool], count: int) -> list[StepRecord]:
        """The next `count` steps of the decode worker that are as wanted; fewer if none comes for long, or if a stream
        ends."""
        met: list[StepRecord] = []
        deadline = time.perf_counter() + STEP_PATIENCE_S
        while len(met) < count and streams.all_go_on() and time.perf_counter() < deadline:
            await asyncio.sleep(POLL_S)
            steps = await self._cluster.new_steps()
            new = [step.record for step in steps if step.role is Role.DECODE and wanted(step.record.shape)]
            deadline = time.perf_counter() + STEP_PATIENCE_S if new else deadline
            met += new
        return met[:count]

    def _new_prompt(self, num_tokens: int) -> list[int]:
        return [self._random.randint(*ID_RANGE) for _ in range(num_tokens)]


def is_decode_of(shape: StepShape, size: int) -> bool:
    return shape.num_decoding == size and not shape.chunks


def covers(records: Sequence[StepRecord], num_prompt: int) -> bool:
    """Are these the steps of one prompt alone, from what was cached to its end?"""
    chunks = [chunk for record in records for chunk in record.shape.chunks]
    follow = all(one.num_before + one.num_new == two.num_before for one, two in pairwise(chunks))
    return len(chunks) == len(records) > 0 and follow and chunks[-1].num_before + chunks[-1].num_new == num_prompt
