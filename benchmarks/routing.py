"""How long does a gateway take to decide where one request goes, in a large cluster?

    python -m benchmarks.routing [--quick] [--json FILE]

256 workers with 100,000 cached prefixes (block names: conversations of 125 blocks, of which some begin alike and lie on
many workers, the others on a few), and 512 live requests, in a real dispatcher over workers that only say what they
have. A decision is all that stands between a tokenised prompt of 2,000 tokens and its submission: what is cached where,
the loads of all workers, the policy's choice, the book-keeping, and who has most of the prompt. Naming the prompt's
blocks is counted apart: it is done once for a request, however often it is placed. Between two decisions a request gets
its first token, another ends, and a quarter of the workers report, so nothing that is kept between decisions
is spared. Prompts share from none to all of a conversation. Python's collector runs as seldom as in a gateway's process
(cluster/garbage.py): as often as it does of itself, it falls into one decision of seventy, and takes longer.

Real time and processor time of this thread, of single decisions. Every other one is taken apart instead, for its parts.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import time
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from benchmarks.report import Row, machine, print_table, print_targets, target, write_json
from cluster.garbage import collect_seldom
from engine.streams import StreamBatch
from engine.types import (
    CacheNews,
    EngineStats,
    Key,
    Move,
    Request,
    Role,
    SamplingParams,
    Service,
    Submission,
    TokenOutput,
)
from router.block_names import BlockNames, Naming
from router.config import RouterConfig
from router.dispatch import Dispatcher
from router.live import LiveRequest
from router.membership import Member, Membership
from router.policies import POLICIES
from router.policies.snapshot import Placement

NUM_WORKERS, NUM_LIVE = 256, 512
NUM_PROMPTS = 128  # of the live ones, without a first token
NUM_REPORTS = NUM_WORKERS // 4  # between two decisions
NUM_PREFIXES, NUM_TOKENS, BLOCK = 100_000, 2000, 16
NUM_SHARED = NUM_TOKENS // 4  # at most, with which ten conversations begin
NUM_CONVERSATIONS = round(1.15 * NUM_PREFIXES / (NUM_TOKENS // BLOCK))  # the shared ones count once
NUM_DECISIONS, QUICK_DECISIONS = 4000, 500
NAMING = Naming(BLOCK, b"benchmark")
SEED = 1
DECIDED, NAMED = "decision", "naming the prompt's blocks"
SERVICE = Service(ttft_s=600.0, tpot_s=60.0)
SAMPLING = SamplingParams(max_tokens=256)

Worker = str


@dataclass(slots=True)
class Silent:
    """A worker that takes everything and never answers. Implements router.workers.WorkerClient."""

    stats_stand: ClassVar[bool] = True

    cache: CacheNews
    stats: EngineStats
    news: asyncio.Event = field(default_factory=asyncio.Event)

    async def submit(self, submission: Submission, role_epoch: int, timeout_s: float) -> None: ...

    async def abort(self, key: Key, timeout_s: float) -> None: ...

    async def move(self, move: Move, timeout_s: float) -> None: ...

    async def tokens(self, gateway_id: str) -> AsyncGenerator[StreamBatch]:
        yield StreamBatch((), self.stats, cache=self.cache)
        while True:
            await self.news.wait()
            self.news.clear()
            yield StreamBatch((), self.stats)

    def stats_by_now(self, told: EngineStats) -> EngineStats:
        return told

    def report(self) -> None:
        """One more step."""
        self.stats = replace(self.stats, num_steps=self.stats.num_steps + 1)
        self.news.set()

    async def close(self) -> None: ...


@dataclass(slots=True)
class Synthetic:
    """Implements Connector and Names."""

    chance: random.Random
    caches: dict[Worker, list[int]] = field(default_factory=lambda: defaultdict(list))
    workers: list[Silent] = field(default_factory=list)
    num_ids: int = 0

    def connect(self, member: Member) -> Silent:
        num_free = self.chance.randrange(1000)
        stats = EngineStats(
            self.chance.randrange(64), self.chance.randrange(4), num_blocks=2048, num_free_blocks=num_free
        )
        self.workers.append(Silent(CacheNews(tuple(self.caches[member.worker_id])), stats))
        return self.workers[-1]

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
    """Connected to all."""
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
    """Milliseconds of each decision: (of real time, of this thread's processor time), by what was done."""

    of: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))

    @contextmanager
    def measured(self, what: str) -> Iterator[None]:
        begun, used = time.perf_counter(), time.thread_time()
        yield
        used_ms = 1e3 * (time.thread_time() - used)
        self.of[what].append((1e3 * (time.perf_counter() - begun), used_ms))

    def rows(self) -> list[Row]:
        return [
            Row(what=what)
            | {f"P{at}, ms": round(float(np.percentile([real for real, _ in times], at)), 3) for at in (50, 99)}
            | {f"CPU P{at}, ms": round(float(np.percentile([used for _, used in times], at)), 3) for at in (50, 99)}
            for what, times in self.of.items()
        ]


@dataclass(slots=True)
class Traffic:
    """The live requests, from the oldest to the newest."""

    dispatcher: Dispatcher
    workers: list[Silent]
    chance: random.Random
    prompts: list[tuple[int, ...]]
    times: Times
    live: deque[LiveRequest] = field(default_factory=deque)
    num_placed: int = 0

    def next_request(self) -> LiveRequest:
        """Its prompt is tokenised and named."""
        request = Request(f"r{self.num_placed}", self.prompts.pop(), SAMPLING, service=SERVICE)
        due = asyncio.get_running_loop().time() + SERVICE.ttft_s
        live = LiveRequest(request, due, due, self.dispatcher.placer.changed)
        live.names = BlockNames(NAMING, request.namespace)
        with self.times.measured(NAMED):
            live.names.of(request.prompt_ids)
        return live

    async def place(self, live: LiveRequest) -> None:
        """As Dispatcher._place does it."""
        placement = await self.dispatcher.placer.choose(live)
        self.dispatcher.placer.placed(live, placement)
        live.place(placement)
        self.dispatcher.learnt.source(live, (placement.first.worker_id, placement.first.incarnation))

    def take_apart(self, live: LiveRequest) -> None:
        placer = self.dispatcher.placer
        with self.times.measured("index"):
            cached = placer.cached(live)
        with self.times.measured("loads of all workers"):
            snapshot = placer.snapshot(live, cached)
        with self.times.measured("policy"):
            placement = POLICIES["slo"](snapshot)
        assert isinstance(placement, Placement)

    async def turn(self) -> None:
        live = self.next_request()
        if self.num_placed % 2:
            self.take_apart(live)
            await self.place(live)
        else:
            with self.times.measured(DECIDED):
                await self.place(live)
        self.live.append(live)
        self.num_placed += 1
        if self.num_placed > NUM_PROMPTS:
            self.give_first_token(self.live[-NUM_PROMPTS - 1])
        if len(self.live) > NUM_LIVE:
            self.dispatcher.placer.ended(self.live.popleft())
        for worker in self.chance.sample(self.workers, NUM_REPORTS):
            worker.report()

    def give_first_token(self, live: LiveRequest) -> None:
        """And the next one, from where it decodes."""
        assert live.placement is not None
        first, decode = live.placement.first, live.placement.decode or live.placement.first
        live.take(TokenOutput(live.key, 0, (1,)), first.worker_id)
        live.take(TokenOutput(live.key, 1, (1,)), decode.worker_id)


async def measure(num_decisions: int) -> tuple[int, Times]:
    chance = random.Random(SEED)
    to, talks = Synthetic(chance), conversations(chance)
    spread_caches(to, talks, chance)
    prompts = [prompt_of(talks, chance) for _ in range(NUM_LIVE + 2 * num_decisions)]
    dispatcher = await dispatcher_of(to)
    traffic = Traffic(dispatcher, to.workers, chance, prompts, Times())
    collect_seldom()
    for turn in range(NUM_LIVE + 2 * num_decisions):
        if turn == NUM_LIVE:
            traffic.times.of.clear()
        await traffic.turn()
        await asyncio.sleep(0)  # the workers are heard
    num_names = dispatcher.learnt.prefixes.num_names
    await dispatcher.close()
    return num_names, traffic.times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_DECISIONS} decisions instead of {NUM_DECISIONS}")
    parser.add_argument("--json", metavar="FILE", help="write rows and target there too")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # of workers that are let go
    num_names, times = asyncio.run(measure(QUICK_DECISIONS if options.quick else NUM_DECISIONS))
    rows = times.rows()
    print_table(f"one request, {NUM_WORKERS} workers, {num_names} prefixes, {NUM_LIVE} live; {machine()}", rows)
    (p99,) = [float(str(row["P99, ms"])) for row in rows if row["what"] == DECIDED]
    promised = [target("routing", "decision P99, ms", p99)]
    print_targets(promised)
    write_json(options.json, rows, promised)


if __name__ == "__main__":
    main()
