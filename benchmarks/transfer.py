"""How fast KV moves between two processes of one host, by each carrier, beside a memory copy and a bare socket.

    python -m benchmarks.transfer [--quick] [--json FILE]

The producer is a process with a real outbox, server and door; here a real puller copies each transfer into a pool and
checks it. A transfer is a hand-off of so many bytes whose blocks are all computed, in frames of the default size, from
its lease to the verified COMMIT. Medians of 7, one of each kind in turn; each is done with frame digests and without.
Beside it: one copy of as many bytes by this process, and as many bytes through a bare TCP socket on loopback.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import grpc
import numpy as np

from benchmarks.report import Row, machine, median, print_table, print_targets, target, write_json
from cluster.rpc.auth import Gatekeeper, call_token
from cluster.rpc.channels import OPTIONS, Channels
from engine.planes import attention_layout
from engine.pool import SharedPool
from engine.types import Endpoint, Key, Request, SamplingParams
from kv_transfer.carriers.choice import ChosenCarriers
from kv_transfer.carriers.door import PoolDoor
from kv_transfer.carriers.grpc import kv_handler
from kv_transfer.carriers.sample import Sample
from kv_transfer.config import TransferConfig
from kv_transfer.handoff import HandOff
from kv_transfer.lease import Lease
from kv_transfer.pull import Puller
from prefill_worker.outbox import Outbox

LAYOUT = attention_layout(num_layers=32, num_kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16")  # 2 MiB a block
MB = 2**20
SIZES, QUICK_SIZES = (2 * MB, 16 * MB, 64 * MB, 256 * MB, 1024 * MB), (2 * MB, 16 * MB, 64 * MB)
ROUNDS, QUICK_ROUNDS = 7, 5
SECRET, INCARNATION = b"b" * 32, "benchmark"
CARRIERS = ("shm", "grpc")
COMPARED = 64 * MB  # the size that targets are about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 64 MiB, five rounds: under a minute")
    parser.add_argument("--json", metavar="FILE", help="write rows and targets there too")
    options = parser.parse_args()
    sizes, rounds = (QUICK_SIZES, QUICK_ROUNDS) if options.quick else (SIZES, ROUNDS)
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    producer = context.Process(target=_produce, args=(theirs, max(sizes) // LAYOUT.bytes_per_block), daemon=True)
    producer.start()
    try:
        rates = asyncio.run(measure(ours, sizes, rounds))
    finally:
        ours.send(None)
        producer.join(5)
    rows = [_row(size, found) for size, found in rates.items()]
    print_table(f"One transfer between two processes, medians of {rounds}, GB/s; {machine()}", rows)
    compared = rates[COMPARED]
    targets = [
        target("transfer", "shm over memcpy", compared["shm"] / compared["memcpy"]),
        target("transfer", "grpc over socket", compared["grpc"] / compared["socket"]),
    ]
    print_targets(targets)
    write_json(options.json, rows, targets)


def _row(size: int, rates: dict[str, float]) -> Row:
    row: Row = {"MiB": size // MB}
    return row | {kind: round(rate, 2) for kind, rate in rates.items()}


async def measure(producer: Connection, sizes: tuple[int, ...], rounds: int) -> dict[int, dict[str, float]]:
    """GB/s of each kind, by size in bytes."""
    address, port = await asyncio.to_thread(producer.recv)
    channels, rates = Channels(SECRET), {}
    target_pool = SharedPool(LAYOUT, max(sizes) // LAYOUT.bytes_per_block)
    target_pool.memory[:] = bytes(len(target_pool.memory))  # its pages are there before anything is timed
    pools = {
        name: ChosenCarriers(channels, LAYOUT, call_token(SECRET), TransferConfig(carrier=name)) for name in CARRIERS
    }
    for size in sizes:
        num_blocks = size // LAYOUT.bytes_per_block
        times: dict[str, list[float]] = {}
        for number in range(rounds + 1):
            found = {"memcpy": _copy(size), "socket": await asyncio.to_thread(_receive, port, size, target_pool)}
            for name, carriers in pools.items():
                for digests in (True, False):
                    lease = await _granted(producer, address, num_blocks)
                    puller = Puller(
                        LAYOUT, target_pool, range(num_blocks), carriers.carrier(lease), lease, verify_digests=digests
                    )
                    begun = time.perf_counter()
                    pulled = await puller.run(60.0)
                    found[name if digests else f"{name} unchecked"] = time.perf_counter() - begun
                    assert (pulled.size_bytes, pulled.num_resumes, pulled.carrier) == (size, 0, name)
                    await carriers.carrier(lease).release(lease)
            for kind, seconds in found.items() if number else ():  # the first one warms up
                times.setdefault(kind, []).append(seconds)
        rates[size] = {kind: size / median(all_s) / 1e9 for kind, all_s in times.items()}
    for carriers in pools.values():
        await carriers.close()
    await channels.close()
    return rates


async def _granted(producer: Connection, address: str, num_blocks: int) -> Lease:
    producer.send(num_blocks)
    name, secret = await asyncio.to_thread(producer.recv)
    return Lease(Key(name, 0), "p0", INCARNATION, address, "cohort", secret)


def _copy(size: int) -> float:
    source, copied = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    copied.fill(2)
    begun = time.perf_counter()
    copied[:] = source
    return time.perf_counter() - begun


def _receive(port: int, size: int, into: SharedPool) -> float:
    with socket.create_connection(("127.0.0.1", port)) as sock:
        begun = time.perf_counter()
        sock.sendall(size.to_bytes(8, "little"))
        view, got = memoryview(into.memory), 0
        while got < size:
            got += sock.recv_into(view[got : min(size, got + MB)])
        view.release()
        return time.perf_counter() - begun


# --- the producer's process --------------------------------------------------------------------------------------


def _produce(pipe: Connection, num_blocks: int) -> None:
    asyncio.run(_serve(pipe, num_blocks))


async def _serve(pipe: Connection, num_blocks: int) -> None:
    pool, sample = SharedPool(LAYOUT, num_blocks), Sample()
    pool.memory[:] = np.random.default_rng(0).bytes(pool.size_bytes)
    outbox = Outbox(LAYOUT, pool, TransferConfig().frame_bytes, 600.0, lambda: "secret", lambda _key: None)
    server = grpc.aio.server(interceptors=[Gatekeeper(SECRET, INCARNATION)], options=OPTIONS)
    server.add_generic_rpc_handlers((kv_handler(outbox, sample),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    door = PoolDoor(pool, sample.fd, call_token(SECRET), INCARNATION)
    bare = await asyncio.start_server(_sender(pool), "127.0.0.1", 0)
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


def _sender(pool: SharedPool) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]:
    async def send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        size = int.from_bytes(await reader.readexactly(8), "little")
        raw = writer.get_extra_info("socket")
        with socket.socket(fileno=os.dup(raw.fileno())) as sock:
            sock.setblocking(True)
            await asyncio.to_thread(sock.sendall, memoryview(pool.memory)[:size])
        writer.close()

    return send


if __name__ == "__main__":
    main()
