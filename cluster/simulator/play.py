"""Plays a workload on a simulated cluster, one client per request, and tells how each fared.

1. each arrival becomes a request at its time, whether earlier ones are served or not (an open loop);
2. workers are looked at every `sample_s`;
3. it ends when the last request has, then the cluster is let go of.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field

from cluster.simulator.clock import run_virtual
from cluster.simulator.gaps import Gaps
from cluster.simulator.links import times_of
from cluster.simulator.log import EventLog
from cluster.simulator.results import RequestResult, SimulationResult, WorkerSample
from cluster.simulator.spec import WorldSpec
from cluster.simulator.workloads.prompts import prompt_of
from cluster.simulator.workloads.workload import Arrival, Workload
from cluster.simulator.world import World
from engine.errors import SteelyardError
from engine.types import Request, SamplingParams, TokenOutput

SAMPLE_S = 1.0
OBJECTS_BETWEEN_COLLECTIONS = 50_000


def simulate(
    spec: WorldSpec, workload: Workload, log: EventLog, sample_s: float = SAMPLE_S,
    on_progress: Callable[[int, float], None] = lambda _num_ended, _now_s: None,
    on_start: Callable[[World], None] = lambda _world: None,
) -> SimulationResult:  # fmt: skip
    """Raises LostErrors and what failed in a worker. `on_progress` hears how many requests have ended, and the time;
    `on_start` gets the cluster before the first request, to change it under way or to look at it in the end."""
    with _rare_collections():
        return run_virtual(_play(spec, workload, log, sample_s, on_progress, on_start))


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Most of what a long simulation has made is there to stay, and need not be looked through again and again."""
    before = gc.get_threshold()
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


async def _play(
    spec: WorldSpec, workload: Workload, log: EventLog, sample_s: float, on_progress: Callable[[int, float], None],
    on_start: Callable[[World], None],
) -> SimulationResult:  # fmt: skip
    world = World(spec, log)
    await world.start()
    on_start(world)
    loop = asyncio.get_running_loop()
    begun = loop.time()
    results: dict[int, RequestResult] = {}
    samples: list[WorkerSample] = []
    gaps = Gaps()

    async def sample() -> None:
        while True:
            samples.extend(_samples(world, loop.time() - begun))
            on_progress(len(results), loop.time() - begun)
            await asyncio.sleep(sample_s)

    async def serve(number: int) -> None:
        results[number] = await _Client(world, workload, number, begun, gaps).run()

    sampling = loop.create_task(sample(), name="samples")
    clients = []
    for number, arrival in enumerate(workload.arrivals):
        await asyncio.sleep(max(0.0, begun + arrival.at_s - loop.time()))
        clients = [task for task in clients if not task.done()]
        clients.append(loop.create_task(serve(number), name=f"client {number}"))
    await asyncio.gather(*clients)
    span_s = loop.time() - begun
    sampling.cancel()
    await asyncio.gather(sampling, return_exceptions=True)
    await world.close()
    steps = [(worker.runner.num_steps, worker.runner.num_extrapolated) for worker in world.all_workers]
    return SimulationResult(
        tuple(results[number] for number in range(len(workload.arrivals))), tuple(samples), tuple(world.happenings),
        span_s, sum(num for num, _ in steps), sum(num for _, num in steps), log.digest(), gaps,
        world.num_events, world.recomputation.num_first, world.recomputation.by_cause,
    )  # fmt: skip


@dataclass(slots=True)
class _Client:
    """One request as its client sees it."""

    world: World
    workload: Workload
    number: int
    begun: float
    gaps: Gaps
    _times: list[float] = field(default_factory=list)  # of its tokens
    _cached_tokens: int = 0
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    async def run(self) -> RequestResult:
        loop, spec = self._loop, self.world.spec
        arrived, request = loop.time(), self._request()
        error = ""
        if spec.gateway_s:
            await asyncio.sleep(spec.gateway_s)
        try:
            async with aclosing(self.world.generate(request)) as outputs:
                async for output in outputs:
                    if not (self._times or self.world.log.detailed):
                        self.world.dispatcher.tap(request.request_id, self._take)
                    self._take(output)
        except SteelyardError as failure:
            error = failure.code
        arrival, times = self._arrival, self._times
        self.gaps.add(times)
        return RequestResult(
            request.request_id, arrived - self.begun, arrival.num_prompt, arrival.num_output, len(times),
            self._cached_tokens, times[0] - arrived if times else None, times[1] - times[0] if times[1:] else None,
            loop.time() - self.begun + spec.token_s * max(0, len(times) - 1), error,
        )  # fmt: skip

    def _take(self, output: TokenOutput) -> bool:
        """From the second on mostly past the iterator, which takes longer to hand one on than all else here."""
        self._times += times_of(output, self._loop.time(), self._times[-1] if self._times else 0.0)
        self._cached_tokens = output.cached_tokens
        return True

    @property
    def _arrival(self) -> Arrival:
        return self.workload.arrivals[self.number]

    def _request(self) -> Request:
        prompt = prompt_of(self.workload, self.number, self.world.spec.vocab_size)
        sampling = SamplingParams(self._arrival.num_output, seed=self.number, ignore_eos=True)
        router = self.world.spec.config.router
        return Request(f"r{self.number}", prompt, sampling, timeout_s=router.deadline_s, service=router.service)


def _samples(world: World, now_s: float) -> Iterator[WorkerSample]:
    for worker_id, worker in world.workers.items():
        status = worker.sides.status()
        stats = worker.runner.stats_by(status.stats, world.now)
        yield WorkerSample(
            now_s, worker_id, status.role, stats.num_running, status.num_queued + stats.num_waiting, stats.num_blocks,
            stats.num_free_blocks, stats.num_held_blocks,
        )  # fmt: skip
