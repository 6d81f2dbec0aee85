"""The producer of benchmarks.transfer: a process with a real outbox, server, door and porter, and a bare socket."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import grpc
import numpy as np

from cluster.rpc.auth import Gatekeeper, call_token
from cluster.rpc.channels import OPTIONS
from engine.planes import attention_layout
from engine.pool import SharedPool
from engine.types import Endpoint, Key, Request, SamplingParams
from kv_transfer.carriers.distributed.porters import Porters
from kv_transfer.carriers.distributed.records import PorterSetup
from kv_transfer.carriers.distributed.service import DistService, dist_handler
from kv_transfer.carriers.door import PoolDoor
from kv_transfer.carriers.grpc import kv_handler
from kv_transfer.carriers.sample import Sample
from kv_transfer.config import TransferConfig
from kv_transfer.handoff import HandOff
from prefill_worker.outbox import Outbox

LAYOUT = attention_layout(num_layers=32, num_kv_heads=8, head_dim=128, block_size=8, dtype="bfloat16")  # 1 MiB a block
SECRET, INCARNATION, HOST = b"b" * 32, "benchmark", "127.0.0.1"
CONFIG = TransferConfig()


def porter_setup(num_blocks: int) -> PorterSetup:
    return PorterSetup(LAYOUT, num_blocks, 1, HOST, "cpu", CONFIG.frame_bytes, CONFIG.pull_timeout_s / 2)


def produce(pipe: Connection, num_blocks: int) -> None:
    """Says (address, port of the bare socket), then a lease's name and secret for each number of blocks that it is
    told, until that is None."""
    asyncio.run(_serve(pipe, num_blocks))


async def _serve(pipe: Connection, num_blocks: int) -> None:
    pool, sample = SharedPool(LAYOUT, num_blocks), Sample()
    pool.memory[:] = np.random.default_rng(0).bytes(pool.size_bytes)
    outbox = Outbox(LAYOUT, pool, CONFIG.frame_bytes, 600.0, lambda: "secret", lambda _key: None)
    porters = Porters(porter_setup(num_blocks), pool, sample)
    await porters.ready()
    server = grpc.aio.server(interceptors=[Gatekeeper(SECRET, INCARNATION)], options=OPTIONS)
    server.add_generic_rpc_handlers((kv_handler(outbox, sample), dist_handler(DistService(outbox, porters))))
    address = f"{HOST}:{server.add_insecure_port(f'{HOST}:0')}"
    await server.start()
    door = PoolDoor(pool, sample.fd, call_token(SECRET), INCARNATION)
    bare = await asyncio.start_server(_sender(pool), HOST, 0)
    pipe.send((address, bare.sockets[0].getsockname()[1]))
    number = 0
    while (wanted := await asyncio.to_thread(pipe.recv)) is not None:
        number += 1
        key = Key(f"r{number}", 0)
        lease = outbox.grant(key, Endpoint("p0", INCARNATION, address, "cohort"))
        num_tokens = wanted * LAYOUT.block_size
        request = Request(key.request_id, (1,) * num_tokens, SamplingParams(max_tokens=2), 0, (7,))
        outbox.commit(key, tuple(range(wanted)), HandOff(request, num_tokens, 0, "g").encode())
        pipe.send((key.request_id, lease.secret))
    bare.close()
    await door.close()
    await server.stop(grace=0)
    await porters.stop()


def _sender(pool: SharedPool) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]:
    async def send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        size = int.from_bytes(await reader.readexactly(8), "little")
        raw = writer.get_extra_info("socket")
        with socket.socket(fileno=os.dup(raw.fileno())) as sock:
            sock.setblocking(True)
            await asyncio.to_thread(sock.sendall, memoryview(pool.memory)[:size])
        writer.close()

    return send
