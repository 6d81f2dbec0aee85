"""One simulated worker that a test submits to directly, and what its requests got, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from cluster.config import ClusterConfig
from cluster.simulator.clock import run_virtual
from cluster.simulator.links import times_of
from cluster.simulator.log import EventLog
from cluster.simulator.service_times.roofline import Roofline
from cluster.simulator.spec import WorldSpec
from cluster.simulator.world import SimulatedWorker, World
from engine.types import STANDARD, ErrorInfo, Request, Role, SamplingParams, Service, Submission

LIMIT_S = 3600.0
STEPS = Roofline()  # 6 ms to decode, and 50 us for each token of a prompt where these are many


@dataclass(eq=False)
class OneWorker:
    """`times`: when the tokens of each request came; `tokens`: these; `errors`: what ended it early."""

    world: World
    worker: SimulatedWorker
    times: dict[str, list[float]] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    errors: dict[str, ErrorInfo] = field(default_factory=dict)
    submitted: dict[str, float] = field(default_factory=dict)

    def submit(self, name: str, num_prompt: int, num_output: int, service: Service = STANDARD) -> Request:
        """All of it here. Raises Overloaded."""
        number = len(self.submitted)
        prompt = tuple(16 + (31 * number + 7 * index) % 900 for index in range(num_prompt))  # no two begin alike
        request = Request(name, prompt, SamplingParams(num_output, seed=number, ignore_eos=True), service=service)
        self.submitted[name] = self.world.now
        self.times[name], self.tokens[name] = [], []
        self.worker.sides.submit(Submission(request, "g", None), 0)
        return request

    async def read(self) -> None:
        async for batch in self.worker.sides.subscribe("g"):
            for output in batch.outputs:
                name = output.key.request_id
                self.times[name] += times_of(output, self.world.now, 0.0)
                self.tokens[name] += output.token_ids
                if output.error is not None:
                    self.errors[name] = output.error

    def ttft_s(self, name: str) -> float:
        return self.times[name][0] - self.submitted[name]

    def tpot_s(self, name: str) -> float:
        """As clients and benchmarks count it: the time after the first token, by the tokens after it."""
        times = self.times[name]
        return (times[-1] - times[0]) / (len(times) - 1)


def on_one_worker(
    act: Callable[[OneWorker], Awaitable[None]], plain: bool = True, steps: Roofline = STEPS, **sections: object
) -> OneWorker:
    """What is left after a test's act on a decode worker."""
    engine: object = {"num_blocks": 8192, "max_batch_tokens": 512, "prefill_chunk": 256}
    config = ClusterConfig.model_validate({"engine": engine} | sections)
    left: list[OneWorker] = []

    async def main() -> None:
        world = World(WorldSpec(3, config, steps, plain=plain, bursts=False), EventLog(keep=False, detailed=False))
        await world.start()
        one = OneWorker(world, world.workers[f"{Role.DECODE}-0"])
        left.append(one)
        reading = asyncio.get_running_loop().create_task(one.read())
        await act(one)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await world.close()

    run_virtual(main(), LIMIT_S)
    return left[0]
