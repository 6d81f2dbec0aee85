"""How long does a stream stand still when its request moves to another decode worker?

    python -m benchmarks.migration [--quick] [--json FILE]

One prefill and two decode workers of configs/local.yaml (engines in processes of their own) and the gateway's
dispatcher in this process. A stream at a time, after prompts of 512 and 2,048 tokens: every 24 tokens it goes to the
other decode worker. The pause is the time between the last token of one worker and the first of the other, less one
decode step (the median of the other gaps of the same stream), and is told in decode steps. The floor is what crosses
before the next step can begin: a question to each engine, an offer, and the tail of at most two blocks. The last column
is how long the whole move took, while the stream went on. The tokens must be those of a stream that does not move.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

import numpy as np

from benchmarks.report import Row, machine, median, print_table, print_targets, spread, target, write_json
from cluster.config import load_config
from cluster.gateway import SystemNames, naming_of
from cluster.rpc.channels import Channels
from cluster.rpc.client import GrpcConnector
from cluster.spec import WorkerSpec
from cluster.worker import Worker
from engine.types import Request, Role, SamplingParams, TokenOutput
from router.dispatch import Dispatcher
from router.membership import Member, Membership

LENGTHS = (512, 2048)
EVERY = 24  # tokens
NUM_MOVES, QUICK_MOVES = 15, 4
MAX_TOKEN_ID, FIRST_TOKEN_ID = 40_000, 100
SETTLE_S = 1.0


@dataclass(slots=True)
class Moves:
    """Of one stream; times in seconds."""

    tokens: list[int] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)  # between tokens of one worker
    pauses: list[float] = field(default_factory=list)  # between the last of one and the first of the other
    whole: list[float] = field(default_factory=list)  # moves, copying included

    @property
    def step_s(self) -> float:
        return median(self.gaps)

    @property
    def pauses_in_steps(self) -> list[float]:
        return [(pause - self.step_s) / self.step_s for pause in self.pauses]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_MOVES} moves of the shorter prompt")
    parser.add_argument("--json", metavar="FILE", help="write rows and targets there too")
    options = parser.parse_args()
    lengths, num_moves = (LENGTHS[:1], QUICK_MOVES) if options.quick else (LENGTHS, NUM_MOVES)
    found = asyncio.run(measure(lengths, num_moves))
    rows = [_row(length, moves) for length, moves in found.items()]
    print_table(f"A stream that moves between two decode workers, float32; {machine()}", rows)
    worst = max(median(moves.pauses_in_steps) for moves in found.values())
    targets = [target("migration", "pause in decode steps", worst)]
    print_targets(targets)
    write_json(options.json, rows, targets)


async def measure(lengths: tuple[int, ...], num_moves: int) -> dict[int, Moves]:
    numbers = np.random.default_rng(0)
    found: dict[int, Moves] = {}
    async with cluster() as dispatcher:
        for length in lengths:
            prompt = tuple(numbers.integers(FIRST_TOKEN_ID, MAX_TOKEN_ID, length).tolist())
            sampling = SamplingParams(EVERY * (num_moves + 2), temperature=0.0, ignore_eos=True)
            still = await one_stream(dispatcher, Request(f"still-{length}", prompt, sampling), num_moves=0)
            found[length] = await one_stream(dispatcher, Request(f"moving-{length}", prompt, sampling), num_moves)
            assert found[length].tokens == still.tokens, "a stream that moves has the same tokens"
            assert len(found[length].pauses) >= num_moves - 1, "it has moved as often as it should"
    return found


async def one_stream(dispatcher: Dispatcher, request: Request, num_moves: int) -> Moves:
    found, moving = Moves(), []
    async with aclosing(timed(dispatcher, request)) as outputs:
        last: float | None = None
        async for now, output in outputs:
            if any(name == "migration_pause" for name, _ in output.stages):
                found.pauses.append(now - (last or now))
            elif last is not None and output.first_index > 1:
                found.gaps.append((now - last) / len(output.token_ids))
            last = now
            before = len(found.tokens)
            found.tokens += output.token_ids
            if before // EVERY < len(found.tokens) // EVERY and len(moving) < num_moves:
                moving.append(asyncio.create_task(move(dispatcher, request.request_id, found)))
    await asyncio.gather(*moving)
    return found


async def timed(dispatcher: Dispatcher, request: Request) -> AsyncGenerator[tuple[float, TokenOutput]]:
    async with aclosing(dispatcher.generate(request)) as outputs:
        async for output in outputs:
            yield time.perf_counter(), output


async def move(dispatcher: Dispatcher, request_id: str, found: Moves) -> None:
    (here,) = [one.worker for one in dispatcher.moves.generating() if one.request_id == request_id]
    decode = [one.member for one in dispatcher.loads() if one.member.role is Role.DECODE]
    (there,) = [one for one in decode if one != here]
    begun = time.perf_counter()
    await dispatcher.moves.migrate(request_id, there)
    found.whole.append(time.perf_counter() - begun)


@asynccontextmanager
async def cluster() -> AsyncGenerator[Dispatcher]:
    config, secret = load_config("configs/local.yaml", {"router.migrate_below": 0.0}), secrets.token_bytes(32)
    channels = Channels(secret)
    naming = naming_of(config.engine, secret)
    dispatcher = Dispatcher(config.router, "bench", GrpcConnector(channels), SystemNames(), naming=naming)
    roles = {"prefill-0": Role.PREFILL, "decode-0": Role.DECODE, "decode-1": Role.DECODE}
    workers = [
        Worker(WorkerSpec(name, secrets.token_hex(4), role, "127.0.0.1"), config, secret)
        for name, role in roles.items()
    ]
    try:
        members: list[Member] = [await worker.start() for worker in workers]
        dispatcher.apply(Membership(1, tuple(members)))
        await asyncio.sleep(SETTLE_S)
        yield dispatcher
    finally:
        await dispatcher.close()
        for worker in workers:
            await worker.stop()
        await channels.close()


def _row(length: int, moves: Moves) -> Row:
    return {
        "prompt tokens": length,
        "moves": len(moves.pauses),
        "decode step ms": spread([1e3 * gap for gap in moves.gaps]),
        "pause ms": spread([1e3 * (pause - moves.step_s) for pause in moves.pauses]),
        "in steps": spread(moves.pauses_in_steps, digits=2),
        "whole move ms": spread([1e3 * whole for whole in moves.whole], digits=0),
    }


if __name__ == "__main__":
    main()
