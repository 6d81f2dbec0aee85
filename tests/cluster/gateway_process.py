"""A gateway in a process of its own, so that a test can kill it as a machine would.

`python -m tests.cluster.gateway_process ORDERS` takes Orders as JSON, and writes its address once a canary came back.
"""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.config import load_config
from cluster.gateway import Gateway
from engine.types import Role
from router.membership import Member, Membership

if TYPE_CHECKING:  # it brings an engine, which a gateway does without
    from tests.cluster.harness import LocalCluster

ROOT = Path(__file__).resolve().parents[2]
START_S = 60.0


@asynccontextmanager
async def beside(cluster: LocalCluster, overrides: Mapping[str, object], gateway_id: str) -> AsyncIterator[Process]:
    """Another gateway of the same cluster, ready; killed at the end at the latest."""
    orders = {
        "overrides": {**overrides, "router.port": int(cluster.url.rpartition(":")[2])},
        "secret": cluster.secret.hex(),
        "gateway_id": gateway_id,
        "members": [as_order(member) for member in cluster.members.values()],
    }
    command = (sys.executable, "-m", "tests.cluster.gateway_process", json.dumps(orders))
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        async with asyncio.timeout(START_S):
            line = await process.stdout.readline()
        assert line.decode().strip() == cluster.url
        yield process
    finally:
        await kill(process)


def as_order(member: Member) -> dict[str, object]:
    return {field.name: getattr(member, field.name) for field in fields(member) if field.init}


async def kill(process: Process) -> None:
    """Returns when it has ended, and with it its sockets."""
    with suppress(ProcessLookupError):  # it has ended before
        process.kill()
    await process.wait()


async def serve(orders: Mapping) -> None:
    config = load_config(ROOT / "configs/local.yaml", orders["overrides"])
    gateway = Gateway(config, bytes.fromhex(orders["secret"]), orders["gateway_id"])
    url = await gateway.start()
    members = tuple(Member(**{**member, "role": Role(member["role"])}) for member in orders["members"])
    gateway.apply(Membership(1, members, num_gateways=2))
    async with asyncio.timeout(START_S):
        await gateway.ready()
    print(url, flush=True)
    await gateway.failed()


if __name__ == "__main__":
    asyncio.run(serve(json.loads(sys.argv[1])))
