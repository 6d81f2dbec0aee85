"""How long does a gateway take to decide where one request goes, in a large cluster?

    python -m benchmarks.routing [--quick] [--json FILE]

256 workers with 100,000 cached prefixes (block names: conversations of 125 blocks, of which some begin alike and lie on
many workers, the others on a few), and 512 live requests, in a real dispatcher over workers that only say what they
have. A decision is all that stands between a tokenised prompt of 2,000 tokens and its submission: the loads of all
workers, the policy's choice, and who has most of the prompt. Naming the prompt's blocks is counted apart: it is done
once for a request, however often it is placed. Real time, of single decisions; prompts share from none to all of a
conversation.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import time
from collections import defaultdict
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import numpy as np

from benchmarks.report import Row, machine, print_table, print_targets, target, write_json
from engine.streams import StreamBatch
from engine.types import CacheNews, EngineStats, Key, Move, Request, Role, SamplingParams, Service, Submission
from router.block_names import BlockNames, Naming
from router.config import RouterConfig
from router.dispatch import Dispatcher
from router.live import LiveRequest
from router.membership import Member, Membership
from router.policies import POLICIES
from router.policies.snapshot import Placement

NUM_WORKERS, NUM_LIVE = 256, 512
NUM_PREFIXES, NUM_TOKENS, BLOCK = 100_000, 2000, 16
NUM_SHARED = NUM_TOKENS // 4  # at most, with which ten conversations begin
NUM_CONVERSATIONS = round(1.15 * NUM_PREFIXES / (NUM_TOKENS // BLOCK))  # the shared ones count once
NUM_DECISIONS, QUICK_DECISIONS = 5000, 500
NAMING = Naming(BLOCK, b"benchmark")
SEED = 1
SERVICE = Service(ttft_s=600.0, tpot_s=60.0)

Worker = str


@dataclass(slots=True)
class Silent:
    """A worker that takes everything and never answers. Implements router.workers.WorkerClient."""

    cache: CacheNews
    stats: EngineStats

    async def submit(self, submission: Submission, role_epoch: int, timeout_s: float) -> None: ...

    async def abort(self, key: Key, timeout_s: float) -> None: ...

    async def move(self, move: Move, timeout_s: float) -> None: ...

    async def tokens(self, gateway_id: str) -> AsyncGenerator[StreamBatch]:
        yield StreamBatch((), self.stats, cache=self.cache)
        while True:
            await asyncio.sleep(1)
            yield StreamBatch((), self.stats)

    def stats_by_now(self, told: EngineStats) -> EngineStats:
        return told

    async def close(self) -> None: ...


@dataclass(slots=True)
class Synthetic:
    """Implements Connector and Names."""

    chance: random.Random
    caches: dict[Worker, list[int]] = field(default_factory=lambda: defaultdict(list))
    num_ids: int = 0

    def connect(self, member: Member) -> Silent:
        num_free = self.chance.randrange(1000)
        stats = EngineStats(
            self.chance.randrange(64), self.chance.randrange(4), num_blocks=2048, num_free_blocks=num_free
        )
        return Silent(CacheNews(tuple(self.caches[member.worker_id])), stats)

    def new_request_id(self) -> str:
        self.num_ids += 1
        return f"r{self.num_ids}"

    def new_seed(self) -> int:
        return 1


def members() -> tuple[Member, ...]:
    roles = [Role.PREFILL, Role.DECODE] * (NUM_WORKERS // 2)
    return tuple(Member(f"{role}-{index}", "1", role, 0, f"{index}:1", "c", 2**15) for index, role in enumerate(roles))


def conversations(chance: random.Random) -> list[tuple[int, ...]]:
    """The first of every ten begins with what the other nine go on from, at some place."""
    made: list[tuple[int, ...]] = []
    for index in range(NUM_CONVERSATIONS):
        shared = made[index - index % 10][: chance.randrange(NUM_SHARED)] if index % 10 else ()
        made.append((*shared, *(chance.randrange(50_000) for _ in range(NUM_TOKENS - len(shared)))))
    return made


def spread_caches(to: Synthetic, talks: list[tuple[int, ...]], chance: random.Random) -> None:
    ids = [member.worker_id for member in members()]
    for index, talk in enumerate(talks):
        names = list(BlockNames(NAMING, "").of(talk))
        for number, worker_id in enumerate(
            chance.sample(ids, chance.randint(1, 8) if index % 10 else NUM_WORKERS // 2)
        ):
            to.caches[worker_id] += names[: chance.randint(1, len(names)) if number else len(names)]


async def dispatcher_of(to: Synthetic) -> Dispatcher:
    """Connected to all, with its live requests placed."""
    config = RouterConfig(max_live_requests=2 * NUM_LIVE)
    dispatcher = Dispatcher(config, "benchmark", to, to, naming=NAMING)
    dispatcher.apply(Membership(1, members()))
    while not all(worker.connected for worker in dispatcher.health().workers):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    return dispatcher


def prompt_of(talks: list[tuple[int, ...]], chance: random.Random) -> tuple[int, ...]:
    known = chance.choice(talks)[: chance.randrange(NUM_TOKENS + 1)]
    return (*known, *(chance.randrange(50_000) for _ in range(NUM_TOKENS - len(known))))


@dataclass(slots=True)
class Times:
    """Milliseconds of each decision, by its parts."""

    naming: list[float] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)
    choice: list[float] = field(default_factory=list)
    lookup: list[float] = field(default_factory=list)

    def rows(self) -> list[Row]:
        parts = {"loads of all workers": self.loads, "policy": self.choice, "index": self.lookup}
        whole = [sum(one) for one in zip(*parts.values(), strict=True)]
        table = parts | {"decision": whole, "naming the prompt's blocks": self.naming}
        return [
            Row(what=what) | {f"P{at}, ms": round(float(np.percentile(times, at)), 3) for at in (50, 99)}
            for what, times in table.items()
        ]


def decide(dispatcher: Dispatcher, live: LiveRequest, into: Times) -> None:
    """As Dispatcher._place does it."""
    begun = time.perf_counter()
    live.names = BlockNames(NAMING, live.request.namespace)
    live.names.of(live.request.prompt_ids)
    named = time.perf_counter()
    cached = dispatcher.placer.cached(live)
    found = time.perf_counter()
    snapshot = dispatcher.placer.snapshot(live, cached)
    loaded = time.perf_counter()
    placement = POLICIES["slo"](snapshot)
    chosen = time.perf_counter()
    assert isinstance(placement, Placement)
    dispatcher.learnt.source(live, (placement.first.worker_id, placement.first.incarnation))
    into.naming.append(1e3 * (named - begun))
    into.lookup.append(1e3 * (found - named + time.perf_counter() - chosen))
    into.loads.append(1e3 * (loaded - found))
    into.choice.append(1e3 * (chosen - loaded))


async def measure(num_decisions: int) -> tuple[int, Times]:
    chance = random.Random(SEED)
    to, talks, times = Synthetic(chance), conversations(chance), Times()
    spread_caches(to, talks, chance)
    prompts = [prompt_of(talks, chance) for _ in range(NUM_LIVE + num_decisions)]
    dispatcher = await dispatcher_of(to)
    streams = [
        asyncio.ensure_future(anext(dispatcher.generate(Request(f"live{index}", prompts.pop(), SamplingParams()))))
        for index in range(NUM_LIVE)
    ]
    await asyncio.sleep(0.5)
    for turn in range(num_decisions):
        live = LiveRequest(Request(f"r{turn}", prompts.pop(), SamplingParams(), service=SERVICE), deadline=0.0)
        decide(dispatcher, live, times)
        await asyncio.sleep(0)  # the workers are heard
    num_names = dispatcher.learnt.prefixes.num_names
    for stream in streams:
        stream.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    await dispatcher.close()
    return num_names, times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_DECISIONS} decisions instead of {NUM_DECISIONS}")
    parser.add_argument("--json", metavar="FILE", help="write rows and target there too")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # of workers that are let go
    num_names, times = asyncio.run(measure(QUICK_DECISIONS if options.quick else NUM_DECISIONS))
    rows = times.rows()
    print_table(f"one request, {NUM_WORKERS} workers, {num_names} prefixes, {NUM_LIVE} live; {machine()}", rows)
    (p99,) = [float(str(row["P99, ms"])) for row in rows if row["what"] == "decision"]
    promised = [target("routing", "decision P99, ms", p99)]
    print_targets(promised)
    write_json(options.json, rows, promised)


if __name__ == "__main__":
    main()
