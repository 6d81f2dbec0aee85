"""A gateway in this process, and workers in processes of their own, which can be killed like any process.

1. `process_cluster` starts the gateway; 2. `start` starts a worker (tests/faults/worker_process.py), which nobody lists
yet; 3. the caller lists and unlists them, as a supervisor would; 4. all that still live are killed in the end.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cluster.config import load_config
from cluster.gateway import Gateway
from cluster.rpc.control_pb2 import WorkerStatus
from engine.types import Request, Role, SamplingParams
from router.membership import Member
from tests.cluster.harness import LocalCluster
from tests.cluster.tiny_model import write_tiny_model
from tests.faults.worker_process import Orders
from tests.oracle.clients import connected, statuses

START_TIMEOUT_S = 90.0
SETTLED_S = 20.0  # more than a lease's life
PROMPT = tuple(token * 7 % 200 for token in range(1500))
ANSWER = SamplingParams(max_tokens=8, temperature=0.9, seed=11, ignore_eos=True)
DEADLINE_S = 30.0  # of a request
SETTINGS: Mapping[str, object] = {
    "engine.prefix_cache": False, "engine.prefill_chunk": 16, "engine.num_blocks": 512,
    "model.max_context": 2048, "kv_transfer.heartbeat_s": 0.2, "kv_transfer.lease_ttl_s": 1.0,
    "kv_transfer.pull_timeout_s": 1.0, "kv_transfer.frame_bytes": 4096,
}  # fmt: skip


@dataclass(eq=False)
class WorkerProcess:
    process: asyncio.subprocess.Process
    member: Member
    log: Path

    async def is_dead(self) -> int:
        """How it ended, once it has."""
        async with asyncio.timeout(DEADLINE_S):
            return await self.process.wait()


@dataclass(eq=False)
class ProcessCluster:
    """`settings`: overrides of configs/local.yaml, for all processes."""

    local: LocalCluster
    settings: Mapping[str, object]
    folder: Path
    workers: dict[str, WorkerProcess] = field(default_factory=dict)

    async def start(
        self, worker_id: str, prefix: Sequence[str] = (), host: str = "127.0.0.1", **settings: object
    ) -> WorkerProcess:
        """Returns when it serves. `worker_id`: role-index. `prefix`: of the command. `settings`: more of them, with __
        for the dot."""
        more = {name.replace("__", "."): value for name, value in settings.items()}
        role = worker_id.rpartition("-")[0]
        orders = Orders(worker_id, role, host, self.local.secret.hex(), {**self.settings, **more})
        log = self.folder / f"{worker_id}.log"
        with log.open("w") as errors:
            process = await asyncio.create_subprocess_exec(
                *prefix, sys.executable, "-m", "tests.faults.worker_process",
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=errors,
            )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(asdict(orders)).encode() + b"\n")
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                line = await process.stdout.readline()
            told = json.loads(line)
        except BaseException as error:
            error.add_note(log.read_text())
            await _end(process)
            raise
        member = Member(**{**told, "role": Role(told["role"])})
        worker = self.workers[worker_id] = WorkerProcess(process, member, log)
        return worker

    async def list_only(self, *worker_ids: str) -> None:
        """As the supervisor does when workers come and go; returns when the gateway reads their tokens."""
        self.local.members = {name: self.workers[name].member for name in worker_ids}
        self.local.publish()
        await connected(self.local)

    async def tokens(self, request_id: str) -> list[int]:
        """The answer to the prompt; raises a SteelyardError instead."""
        request = Request(request_id, PROMPT, ANSWER, timeout_s=DEADLINE_S)
        async with asyncio.timeout(DEADLINE_S + 5.0):
            outputs = self.local.dispatcher.generate(request)
            return [token async for output in outputs for token in output.token_ids]

    async def statuses(self) -> dict[str, WorkerStatus]:
        return await statuses(self.local)

    async def nothing_is_held(self) -> None:
        """By any listed worker: no block, lease, pull or stream."""
        async with asyncio.timeout(SETTLED_S):
            while any(_held(status) for status in (await self.statuses()).values()):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert not any(status.stats.num_leaked_blocks for status in (await self.statuses()).values())

    async def stop(self) -> None:
        await self.local.gateway.stop()
        await asyncio.gather(*(_end(worker.process) for worker in self.workers.values()))


def _held(status: WorkerStatus) -> int:
    blocks = status.stats.num_blocks - status.stats.num_free_blocks
    return blocks + status.num_leases + status.num_pulls + status.num_streams + status.num_queued


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()


@asynccontextmanager
async def process_cluster(folder: Path, settings: Mapping[str, object] = SETTINGS) -> AsyncIterator[ProcessCluster]:
    """With a tiny model, and no worker yet."""
    settings = {**settings, "model.name": str(write_tiny_model(folder / "model")), "router.port": 0}
    config, secret = load_config("configs/local.yaml", settings), secrets.token_bytes(32)
    local = LocalCluster(config, secret, Gateway(config, secret, "gateway-test"))
    cluster = ProcessCluster(local, settings, folder)
    local.url = await local.gateway.start()
    await local.dispatcher.canary.stop()  # which would be the first to meet what waits for a request
    try:
        yield cluster
    finally:
        await cluster.stop()
