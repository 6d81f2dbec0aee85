"""Small real parts for tests of the cluster that need no model, and a program that serves with them.

FakeWorker binds a socket and can be told to fail by its model's name. FakeGateway is a tiny HTTP server whose
/health gives every membership that it was told, with the process id of each worker (in `cohort`), and that reports so
many requests/s to the controller as /load/RATE said last.
`python -m tests.cluster.fakes CONFIG` is `steelyard serve CONFIG` with these parts.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from cluster.config import ClusterConfig
from cluster.spec import Parts, WorkerSpec
from engine.errors import ConfigError, ModelError
from engine.types import Role
from router.api import ControlView
from router.membership import Member, Membership
from router.policies.snapshot import Name
from router.report import GatewayReport
from tests.cluster.control.cases import COHORT, steady, table, worker

PARTS = Parts(
    worker="tests.cluster.fakes:FakeWorker",
    gateway="tests.cluster.fakes:FakeGateway",
    resolve="tests.cluster.fakes:fake_resolve",
)
BROKEN_MODEL = "broken-weights"
DYING_MODEL = "dies-at-start"


def fake_resolve(reference: str, cache_dir: Path | None, progress: Callable[[str, int, int], None]) -> None:
    progress("download", 2**20, 2**21)


class FakeWorker:
    def __init__(self, spec: WorkerSpec, config: ClusterConfig, secret: bytes) -> None:
        assert len(secret) >= 16
        self._spec = spec
        self._model = config.model.name
        self._server: asyncio.Server | None = None

    async def start(self) -> Member:
        if self._model == BROKEN_MODEL:
            raise ModelError("layer 3 of model.safetensors is missing")
        if self._model == DYING_MODEL:
            os._exit(7)
        self._server = await asyncio.start_server(_hang_up, self._spec.host, 0)
        port = self._server.sockets[0].getsockname()[1]
        spec = self._spec
        address = f"{spec.host}:{port}"
        self._member = Member(spec.worker_id, spec.incarnation, spec.role, 0, address, cohort=str(os.getpid()))
        return self._member

    async def relabel(self, role: Role, role_epoch: int) -> None:
        self._member = replace(self._member, role=role, role_epoch=role_epoch)

    async def member(self) -> Member:
        return self._member

    async def failed(self) -> str:
        return await asyncio.get_running_loop().create_future()

    async def num_open(self) -> int:
        return 0

    async def status(self) -> dict[str, object]:
        return {"pid": os.getpid()}

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()


async def _hang_up(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


class FakeGateway:
    """Ready once a worker of each role is listed."""

    def __init__(self, config: ClusterConfig, secret: bytes, gateway_id: str) -> None:
        self._config = config.router
        self._gateway_id = gateway_id
        self._versions: list[int] = []
        self._membership = Membership()
        self._ready = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._rate = 0.0

    async def start(self) -> str:
        try:
            self._server = await asyncio.start_server(
                self._answer, self._config.host, self._config.port, reuse_port=self._config.gateways > 1
            )
        except OSError as error:
            raise ConfigError(f"router.port: {self._config.port} is in use") from error
        return f"http://{self._config.host}:{self._server.sockets[0].getsockname()[1]}"

    def apply(self, membership: Membership) -> None:
        self._membership = membership
        self._versions.append(membership.version)
        if len({member.role for member in membership.members}) == 2:
            self._ready.set()

    def report(self, control: ControlView) -> GatewayReport:
        now = asyncio.get_running_loop().time()
        came = steady(self._rate, now - 0.5, now, num_prompt=8000, num_output=50.0) if self._rate else ()
        stands = tuple(worker(one.worker_id, one.role, incarnation=one.incarnation) for one in self._membership.members)
        return GatewayReport(self._gateway_id, now, came, (), stands, ((COHORT, table()),), 0.0, 16, 128)

    async def evacuate(self, worker: Name, limit_s: float) -> int:
        return 0

    async def ready(self) -> None:
        await self._ready.wait()

    async def failed(self) -> str:
        return await asyncio.get_running_loop().create_future()

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = (await reader.readline()).split()[1].decode()
        if path.startswith("/load/"):
            self._rate = float(path.removeprefix("/load/"))
        while await reader.readline() not in (b"\r\n", b""):
            pass
        health = {
            "pid": os.getpid(),
            "gateway_id": self._gateway_id,
            "versions": self._versions,
            "num_gateways": self._membership.num_gateways,
            "members": [asdict(member) for member in self._membership.members],
        }
        body = json.dumps({"data": [{"id": "fake-model"}]} if path == "/v1/models" else health).encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        writer.close()


if __name__ == "__main__":
    from functools import partial

    from cluster import cli, launch

    setattr(launch, "serve", partial(launch.serve, parts=PARTS))  # noqa: B010 (a type checker knows it as a function)
    sys.argv.insert(1, "serve")
    cli.main()
