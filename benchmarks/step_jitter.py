"""Does serving disturb the engine? A decode step alone, and while a pull and 64 token streams run beside it.

    python -m benchmarks.step_jitter [--quick] [--json FILE]

One decode worker (the real Worker: gRPC server, streams, intake) decodes 64 sequences. In quiet phases nobody reads
them. In loaded phases a peer process reads the 64 streams over gRPC, while this process pulls a 512-token prompt's KV
from the peer, again and again. Phases alternate; each step's own duration is what the engine reports. Once with the
engine in a thread of the worker's process, once in a process of its own. Over 10 % slower in a thread is why the
process is the default. The peer and the worker's process share the second core; the engine has one thread.

What is pulled is checked: every frame's digest, and the bytes in the end.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import sys
from contextlib import aclosing
from dataclasses import dataclass, field

import numpy as np
import xxhash

from benchmarks.report import Row, machine, median, print_table, print_targets, spread, target, write_json
from cluster.config import load_config
from cluster.rpc.channels import Channels
from cluster.rpc.client import GrpcWorkerClient
from cluster.rpc.server import WorkerServer
from cluster.spec import WorkerSpec
from cluster.worker import Worker
from engine.planes import CacheLayout, attention_layout
from engine.pool import SharedPool
from engine.rank_pools import RankPools
from engine.setup import EngineSetup
from engine.step_runner import StepRunner
from engine.types import Add, Command, Endpoint, Key, Request, Role, SamplingParams, StepOutputs
from kv_transfer.carriers.grpc import GrpcCarrier
from kv_transfer.handoff import HandOff
from kv_transfer.lease import Lease
from kv_transfer.pull import Puller
from prefill_worker.outbox import Outbox
from router.membership import Member

NUM_STREAMS = 64
PULL_BLOCKS = 32  # of 16 tokens: a 512-token prompt, 23.6 MB
PULL_EVERY_S = 0.25
GATEWAY_ID = "bench"
PEER = Endpoint("peer", "peer", "", "bench")


def smollm_layout() -> CacheLayout:
    return attention_layout(num_layers=30, num_kv_heads=3, head_dim=64, block_size=16, dtype="float32")


@dataclass
class ObservedRunner:
    """A StepRunner that notes the duration of each step of all sequences, by phase."""

    inner: StepRunner
    loaded: bool = False
    quiet_s: list[float] = field(default_factory=list)
    loaded_s: list[float] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def send(self, command: Command) -> None:
        self.inner.send(command)

    async def outputs(self) -> StepOutputs:
        outputs = await self.inner.outputs()
        if outputs.steps and len(outputs.tokens) == NUM_STREAMS:
            (self.loaded_s if self.loaded else self.quiet_s).append(outputs.steps[-1].step_s)
            self.news.set()
        return outputs

    async def stop(self) -> None:
        await self.inner.stop()

    async def wait_for(self, count: int) -> None:
        """Until `count` more steps were noted."""
        wanted = len(self.quiet_s) + len(self.loaded_s) + count
        while len(self.quiet_s) + len(self.loaded_s) < wanted:
            self.news.clear()
            await self.news.wait()


class ObservedWorker(Worker):
    """A Worker whose engine is observed."""

    async def _start_engine(self, setup: EngineSetup) -> tuple[StepRunner, SharedPool | RankPools | None]:
        runner, pool = await super()._start_engine(setup)
        self.observed = ObservedRunner(runner)
        return self.observed, pool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter phases: under a minute")
    parser.add_argument("--json", metavar="FILE", help="write rows and targets there too")
    parser.add_argument("--peer", nargs=4, metavar="ARGUMENT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        asyncio.run(run_peer(*options.peer))
        return
    steps, phases = (12, 1) if options.quick else (25, 5)
    rows: list[Row] = []
    slowdowns: dict[str, float] = {}
    for runner in ("thread", "process"):
        times, num_pulls = asyncio.run(measure(runner, steps, phases))
        slowdowns[runner] = median(times.loaded_s) / median(times.quiet_s)
        rows.append(
            {
                "engine in a": runner,
                "quiet step ms": spread([1e3 * value for value in times.quiet_s]),
                "loaded step ms": spread([1e3 * value for value in times.loaded_s]),
                "loaded / quiet": f"{slowdowns[runner]:.3f}",
                "steps": len(times.loaded_s),
                "pulls": num_pulls,
            }
        )
    print_table(f"Decode step of {NUM_STREAMS} sequences, SmolLM2 float32, one thread; {machine()}", rows)
    targets = [target("step_jitter", "process_slowdown", slowdowns["process"])]
    print_targets(targets)
    write_json(options.json, rows, targets)


async def measure(runner: str, steps: int, phases: int) -> tuple[ObservedRunner, int]:
    """Alternating phases of `steps` steps each; also how many pulls were made."""
    config = load_config("configs/local.yaml", {"engine.runner": runner, "engine.prefix_cache": False})
    secret = secrets.token_bytes(32)
    worker = ObservedWorker(WorkerSpec("bench", "bench", Role.DECODE, "127.0.0.1"), config, secret)
    member = await worker.start()
    observed, num_pulls = worker.observed, 0
    try:
        for submission in range(NUM_STREAMS):
            start_sequence(worker, submission)
        await observed.wait_for(2)
        for _ in range(phases):
            await observed.wait_for(steps)
            async with asyncio.timeout(300):
                num_pulls += await loaded_phase(observed, steps, secret, member)
    finally:
        await worker.stop()
    return observed, num_pulls


def start_sequence(worker: ObservedWorker, index: int) -> None:
    params = SamplingParams(max_tokens=4000, temperature=0.0, ignore_eos=True)
    request = Request(f"s{index}", tuple(range(index + 1, index + 17)), params)
    worker._sides.streams.register(request.key, GATEWAY_ID)
    worker.observed.send(Add(request))


async def loaded_phase(observed: ObservedRunner, steps: int, secret: bytes, member: Member) -> int:
    """Start the peer, let it read and serve while `steps` steps are noted, end it; returns the number of pulls."""
    whom = (member.worker_id, member.incarnation, member.address)
    command = ("-m", "benchmarks.step_jitter", "--peer", secret.hex(), *whom)
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=pipe, stdin=pipe)
    assert process.stdout is not None and process.stdin is not None
    channels = Channels(secret)
    address, lease_secret, checksum = (await process.stdout.readline()).decode().split()
    lease = Lease(Key("pull", 0), PEER.worker_id, PEER.incarnation, PEER.address, PEER.cohort, lease_secret)
    pulls = asyncio.create_task(pull_again_and_again(GrpcCarrier(channels(address, PEER.incarnation)), lease, checksum))
    await asyncio.sleep(1)  # connections are open
    observed.loaded = True
    await observed.wait_for(steps)
    observed.loaded = False
    pulls.cancel()
    process.stdin.close()
    await process.wait()
    await channels.close()
    return await pulls


async def pull_again_and_again(carrier: GrpcCarrier, lease: Lease, checksum: str) -> int:
    layout = smollm_layout()
    pool = SharedPool(layout, PULL_BLOCKS)
    loop, count = asyncio.get_running_loop(), 0
    try:
        while True:
            begun = loop.time()
            await Puller(layout, pool, range(PULL_BLOCKS), carrier, lease).run(30)
            count += 1
            await asyncio.sleep(max(0.0, begun + PULL_EVERY_S - loop.time()))
    except asyncio.CancelledError:
        if xxhash.xxh3_64_hexdigest(pool.memory) != checksum:
            raise SystemExit("wrong: the pulled bytes are not the peer's") from None
        return count


async def run_peer(secret: str, worker_id: str, incarnation: str, address: str) -> None:
    """The other process: serves one committed hand-off, reads the 64 streams, ends when its input does."""
    layout = smollm_layout()
    pool = SharedPool(layout, PULL_BLOCKS)
    np.frombuffer(pool.memory, np.uint8)[:] = np.random.default_rng(0).integers(0, 256, pool.size_bytes, np.uint8)
    outbox = Outbox(layout, pool, 2**20, 3600, lambda: "bench", lambda key: None)
    lease = outbox.grant(Key("pull", 0), PEER)
    num_tokens = PULL_BLOCKS * layout.block_size
    request = Request("pull", (1,) * num_tokens, SamplingParams(), generated_ids=(1,))
    blocks = tuple(range(PULL_BLOCKS))
    outbox.commit(lease.key, blocks, HandOff(request, num_tokens, 0, GATEWAY_ID).encode())
    server = WorkerServer(bytes.fromhex(secret), PEER.incarnation)
    print(server.bind("127.0.0.1"), lease.secret, xxhash.xxh3_64_hexdigest(pool.memory), flush=True)
    await server.start(None, outbox)  # type: ignore[arg-type]  # KV only
    channels = Channels(bytes.fromhex(secret))
    reading = asyncio.create_task(read_streams(worker_id, incarnation, address, channels))
    await asyncio.to_thread(sys.stdin.read)
    reading.cancel()
    await server.stop()


async def read_streams(worker_id: str, incarnation: str, address: str, channels: Channels) -> None:
    member = Member(worker_id, incarnation, Role.DECODE, 0, address, "")
    async with aclosing(GrpcWorkerClient(member, channels).tokens(GATEWAY_ID)) as batches:
        async for _ in batches:
            pass


if __name__ == "__main__":
    main()
