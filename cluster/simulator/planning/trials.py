"""Trials: the real simulated cluster on a part of the workload, at a rate. A phase alone is such a cluster, too:

- prefill alone: requests want one token, so nothing is handed off;
- decode alone: the prompts come from a prefill worker whose steps take next to nothing, over links without limits. What
  remains of the time to the first token is waiting for room in the decode worker, so all targets count.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from cluster.config import ClusterConfig, PoolConfig, PoolsSection
from cluster.simulator.log import EventLog
from cluster.simulator.network import LinkTimes
from cluster.simulator.planning.guesses import decode_rate, prefill_rate
from cluster.simulator.planning.targets import Metric, Target, Verdict, judge
from cluster.simulator.play import simulate
from cluster.simulator.service_times.model import ServiceTimes
from cluster.simulator.spec import RoleSpec, WorldSpec
from cluster.simulator.workloads.shape import cut, speed_up
from cluster.simulator.workloads.workload import Workload
from engine.step_shape import StepShape
from engine.types import Role

FREE_STEP_S = 1e-6
FREE_LINK = LinkTimes(latency_s=1e-6, bytes_per_s=1e15)
ENDLESS = 10**9  # KV tokens
GROWTH = 1.1  # over what was needed at the last try: requests take longer as more come
FRAME_BYTES = 2**26  # few frames: pulls share links less evenly, and a trial costs less


@dataclass(frozen=True, slots=True)
class Free:
    """Steps that take next to nothing. Implements service_times.model.ServiceTimes."""

    def step_s(self, shape: StepShape) -> float:
        return FREE_STEP_S

    def decode_steps_s(self, num_decoding: int, num_context: int, num_steps: int) -> list[float]:
        return [FREE_STEP_S] * num_steps

    def extrapolates(self, shape: StepShape) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class WorkerKind:
    steps: ServiceTimes
    kv_tokens: int


FREE = WorkerKind(Free(), ENDLESS)


@dataclass(frozen=True, slots=True)
class Fleet:
    num_prefill: int
    num_decode: int
    prefill: WorkerKind
    decode: WorkerKind


class Trials:
    """Each trial plays the first `num_requests` of the workload. A trial that keeps the targets, but is too short to be
    believed, is repeated with more, up to all there are. `on_trial` hears of each one that is done,
    `on_look` is called while one runs."""

    def __init__(
        self, config: ClusterConfig, workload: Workload, num_requests: int, targets: tuple[Target, ...],
        links: LinkTimes, kv_token_bytes: int, seed: int, on_trial: Callable[[Verdict], None] = lambda _: None,
        on_look: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._config = config
        self._workload = workload
        self._num_requests = num_requests
        self._targets = targets
        self._links = links
        self._kv_token_bytes = kv_token_bytes
        self._seed = seed
        self._on_trial = on_trial
        self._on_look = on_look
        self._needed_s: dict[str, float] = {}

    def together(self, fleet: Fleet, rate: float, links: LinkTimes | None = None) -> Verdict:
        return self._grown("together", fleet, self._workload, rate, self._targets, links or self._links)

    def prefill_guess(self, kind: WorkerKind) -> float:
        return prefill_rate(kind.steps, self._workload)

    def decode_guess(self, kind: WorkerKind) -> float:
        limit_s = min(target.limit_s for target in self._targets if target.metric is Metric.TPOT)
        max_batch_seqs = self._config.engine.max_batch_seqs
        return decode_rate(kind.steps, kind.kv_tokens, self._workload, max_batch_seqs, limit_s)

    def prefill_alone(self, kind: WorkerKind, rate: float) -> Verdict:
        arrivals = tuple(replace(arrival, num_output=1) for arrival in self._workload.arrivals)
        workload = replace(self._workload, arrivals=arrivals)
        targets = tuple(target for target in self._targets if target.metric is Metric.TTFT)
        return self._grown("prefill", Fleet(1, 1, kind, FREE), workload, rate, targets, FREE_LINK)

    def decode_alone(self, kind: WorkerKind, rate: float) -> Verdict:
        return self._grown("decode", Fleet(1, 1, FREE, kind), self._workload, rate, self._targets, FREE_LINK)

    def _grown(
        self, name: str, fleet: Fleet, workload: Workload, rate: float, targets: tuple[Target, ...], links: LinkTimes
    ) -> Verdict:
        """What was long enough for the last trial of this name is where this one begins."""
        most = len(workload.arrivals)
        num_requests = min(most, max(self._num_requests, math.ceil(rate * self._needed_s.get(name, 0.0))))
        while True:
            part = at_rate(cut(workload, max_requests=num_requests), rate)
            log = EventLog(keep=False, detailed=False)
            result = simulate(self._spec(fleet, part, links), part, log, on_progress=lambda *_: self._on_look())
            verdict = judge(result, targets)
            self._on_trial(verdict)
            if not verdict.keeps:
                return verdict
            self._needed_s[name] = GROWTH * verdict.needed_s
            if num_requests >= most or not verdict.is_short:
                return verdict
            num_requests = min(most, max(num_requests + 1, math.ceil(rate * self._needed_s[name])))

    def _spec(self, fleet: Fleet, workload: Workload, links: LinkTimes) -> WorldSpec:
        pools = PoolsSection(prefill=PoolConfig(workers=fleet.num_prefill), decode=PoolConfig(workers=fleet.num_decode))
        config = _without_refusals(self._config, len(workload.arrivals)).model_copy(update={"pools": pools})
        roles = {
            role: RoleSpec(kind.steps, _num_blocks(kind, config, workload))
            for role, kind in ((Role.PREFILL, fleet.prefill), (Role.DECODE, fleet.decode))
        }
        most_blocks = max(role.num_blocks for role in roles.values())
        return WorldSpec(
            self._seed, config, links=links, roles=roles, max_context=most_blocks * config.engine.block_size,
            kv_token_bytes=self._kv_token_bytes, plain=True, frame_bytes=FRAME_BYTES,
        )  # fmt: skip


def _num_blocks(kind: WorkerKind, config: ClusterConfig, workload: Workload) -> int:
    """No more than all requests together could ask for: beyond that blocks change only what a trial costs."""
    block_size, num_requests = config.engine.block_size, len(workload.arrivals)
    num_tokens = sum(arrival.num_prompt + arrival.num_output for arrival in workload.arrivals)
    most = (num_tokens // block_size + 2 * num_requests) / config.prefill.outbox_fraction
    return max(4, min(kind.kv_tokens // block_size, math.ceil(most)))


def at_rate(workload: Workload, rate: float) -> Workload:
    """As many requests per second on average, with the arrivals' own bursts."""
    return speed_up(workload, rate / mean_rate(workload))


def mean_rate(workload: Workload) -> float:
    """Of a workload with at least two arrivals, at different times."""
    arrivals = workload.arrivals
    return (len(arrivals) - 1) / (arrivals[-1].at_s - arrivals[0].at_s)


def _without_refusals(config: ClusterConfig, num_requests: int) -> ClusterConfig:
    """What is too much shall show in the times, not in refusals."""
    most = num_requests + 1
    router = config.router.model_copy(update={"max_live_requests": max(most, config.router.max_live_requests)})
    prefill = config.prefill.model_copy(update={"max_queue": max(most, config.prefill.max_queue)})
    return config.model_copy(update={"router": router, "prefill": prefill})
