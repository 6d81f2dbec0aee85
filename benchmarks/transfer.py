"""How fast KV moves between two processes of one host, by each carrier, beside a memory copy, a bare socket and NIXL.

    python -m benchmarks.transfer [--quick] [--nixl-python PATH] [--json FILE]

The producer is a process with a real outbox, server, door and porter; here a real puller takes each transfer into a
pool and checks it. A transfer is a hand-off of so many bytes whose blocks are all computed, in frames of the default
size, from its lease to the verified COMMIT. Medians of 7, one of each kind in turn. With frame digests, and without:
then the reader does not check them, but they are made all the same.
Beside it: one copy of as many bytes by this process; as many through a bare TCP socket on loopback; and as many read by
NIXL over UCX, unchecked, if PATH is a Python that has it (`python3 -m venv DIR && DIR/bin/pip install nixl numpy`).
The first transfer of a new pair is of 1 MiB, and has the measuring of all paths in it. Porters are running by then.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import signal
import socket
import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from benchmarks.report import Row, Target, machine, median, print_table, print_targets, target, write_json
from benchmarks.transfer_producer import HOST, INCARNATION, LAYOUT, SECRET, porter_setup, produce
from cluster.rpc.auth import call_token
from cluster.rpc.channels import Channels
from engine.pool import SharedPool
from engine.types import Key
from kv_transfer.carriers.choice import ChosenCarriers
from kv_transfer.carriers.distributed.porters import Porters
from kv_transfer.carriers.sample import Sample
from kv_transfer.config import TransferConfig
from kv_transfer.lease import Lease
from kv_transfer.pull import Puller

MB = 2**20
SIZES, QUICK_SIZES = (MB, 16 * MB, 64 * MB, 256 * MB, 1024 * MB), (MB, 16 * MB)
ROUNDS, QUICK_ROUNDS = 7, 3
CARRIERS = ("shm", "grpc", "dist")
COMPARED_FROM = 16 * MB  # targets are about the worst size from here on
NIXL_PEER = Path(__file__).parent / "nixl_peer.py"

Rates = dict[int, dict[str, float]]  # GB/s of each kind, by size in bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 and 16 MiB, three rounds: to see that it works")
    parser.add_argument("--nixl-python", metavar="PATH", help="a Python that has nixl and numpy")
    parser.add_argument("--json", metavar="FILE", help="write rows and targets there too")
    options = parser.parse_args()
    sizes, rounds = (QUICK_SIZES, QUICK_ROUNDS) if options.quick else (SIZES, ROUNDS)
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    producer = context.Process(target=produce, args=(theirs, max(sizes) // LAYOUT.bytes_per_block))
    producer.start()
    try:
        with ExitStack() as stack:
            nixl = stack.enter_context(Nixl(options.nixl_python, max(sizes))) if options.nixl_python else None
            first_s, rates = asyncio.run(Measurement(ours, sizes, rounds, nixl).run())
    finally:
        ours.send(None)
        producer.join(10)
    rows = [_row(size, found) for size, found in rates.items()]
    print_table(f"One transfer between two processes, medians of {rounds}, GB/s; {machine()}", rows)
    print_table("What checking digests adds to the time of a transfer, %", [_costs(*one) for one in rates.items()])
    print(f"First transfer of a new pair: {first_s:.3f} s")
    print("NIXL: " + (f"by {options.nixl_python}" if nixl else "absent, no --nixl-python was given"))
    targets = _targets(rates, first_s)
    print_targets(targets)
    write_json(options.json, rows, targets)


def _row(size: int, rates: dict[str, float]) -> Row:
    row: Row = {"MiB": size // MB}
    return row | {kind: round(rate, 2) for kind, rate in rates.items()}


def _costs(size: int, rates: dict[str, float]) -> Row:
    row: Row = {"MiB": size // MB}
    return row | {name: round(100 * (rates[f"{name} unchecked"] / rates[name] - 1)) for name in CARRIERS}


def _targets(rates: Rates, first_s: float) -> list[Target]:
    large = [found for size, found in rates.items() if size >= COMPARED_FROM]

    def least(name: str, kinds: tuple[str, ...], yardstick: str) -> Target:
        return target("transfer", name, min(max(one[kind] for kind in kinds) / one[yardstick] for one in large))

    targets = [
        least("shm over memcpy", ("shm",), "memcpy"),
        least("dist over socket", ("dist",), "socket"),
        least("grpc over socket", ("grpc",), "socket"),
        target("transfer", "first transfer, s", first_s),
    ]
    return [*targets, least("best over NIXL", CARRIERS, "NIXL")] if "NIXL" in large[0] else targets


class Nixl:
    """Two processes of another Python. Each has a thread that polls, so they stand still while others are measured."""

    def __init__(self, python: str, size: int) -> None:
        command = [python, str(NIXL_PEER), str(size)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    def __enter__(self) -> Nixl:
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGCONT)
        self._process.communicate(timeout=30)

    def read(self, size: int) -> float:
        """Seconds."""
        assert self._process.stdin is not None and self._process.stdout is not None
        os.killpg(self._process.pid, signal.SIGCONT)
        print(size, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        os.killpg(self._process.pid, signal.SIGSTOP)
        if not answer:
            raise SystemExit("NIXL failed; its own words are above")
        return float(answer)


@dataclass(slots=True)
class Measurement:
    producer: Connection
    sizes: tuple[int, ...]
    rounds: int
    nixl: Nixl | None
    address: str = ""
    port: int = 0  # of the bare socket
    channels: Channels = field(default_factory=lambda: Channels(SECRET))

    async def run(self) -> tuple[float, Rates]:
        """Seconds of a new pair's first transfer, and rates."""
        self.address, self.port = await asyncio.to_thread(self.producer.recv)
        num_blocks = max(self.sizes) // LAYOUT.bytes_per_block
        pool, sample = SharedPool(LAYOUT, num_blocks), Sample()
        pool.memory[:] = bytes(len(pool.memory))  # its pages are there before anything is timed
        porters = Porters(porter_setup(num_blocks), pool, sample)
        await porters.ready()
        try:
            first_s = median([await self._first(pool, porters) for _ in range(self.rounds)])
            return first_s, {size: await self._rates(size, pool, porters) for size in self.sizes}
        finally:
            await self.channels.close()
            await porters.stop()

    async def _first(self, pool: SharedPool, porters: Porters) -> float:
        channels, lease = Channels(SECRET), await self._granted(1)
        carriers = ChosenCarriers(channels, LAYOUT, call_token(SECRET), TransferConfig(carrier="all"), porters)
        begun = time.perf_counter()
        await Puller(LAYOUT, pool, [0], carriers.carrier(lease), lease).run(60.0)
        first_s = time.perf_counter() - begun
        await carriers.carrier(lease).release(lease)
        await carriers.close()
        await channels.close()
        return first_s

    async def _rates(self, size: int, pool: SharedPool, porters: Porters) -> dict[str, float]:
        token, times = call_token(SECRET), dict[str, list[float]]()
        carriers = {
            name: ChosenCarriers(self.channels, LAYOUT, token, TransferConfig(carrier=name), porters)
            for name in CARRIERS
        }
        for number in range(self.rounds + 1):
            found = {"memcpy": _copy(size), "socket": await asyncio.to_thread(_receive, self.port, size, pool)}
            if self.nixl is not None:
                found["NIXL"] = await asyncio.to_thread(self.nixl.read, size)
            for name, one in carriers.items():
                found[name] = await self._transfer(size, pool, name, one, verify_digests=True)
                found[f"{name} unchecked"] = await self._transfer(size, pool, name, one, verify_digests=False)
            for kind, seconds in found.items() if number else ():  # the first one warms up
                times.setdefault(kind, []).append(seconds)
        for one in carriers.values():
            await one.close()
        return {kind: size / median(all_s) / 1e9 for kind, all_s in times.items()}

    async def _transfer(
        self, size: int, pool: SharedPool, name: str, carriers: ChosenCarriers, verify_digests: bool
    ) -> float:
        num_blocks = size // LAYOUT.bytes_per_block
        lease = await self._granted(num_blocks)
        puller = Puller(LAYOUT, pool, range(num_blocks), carriers.carrier(lease), lease, verify_digests)
        begun = time.perf_counter()
        pulled = await puller.run(60.0)
        taken = time.perf_counter() - begun
        assert (pulled.size_bytes, pulled.num_resumes, pulled.carrier) == (size, 0, name)
        await carriers.carrier(lease).release(lease)
        return taken

    async def _granted(self, num_blocks: int) -> Lease:
        self.producer.send(num_blocks)
        name, secret = await asyncio.to_thread(self.producer.recv)
        return Lease(Key(name, 0), "p0", INCARNATION, self.address, "cohort", secret)


def _copy(size: int) -> float:
    source, copied = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    copied.fill(2)
    begun = time.perf_counter()
    copied[:] = source
    return time.perf_counter() - begun


def _receive(port: int, size: int, into: SharedPool) -> float:
    with socket.create_connection((HOST, port)) as sock:
        begun = time.perf_counter()
        sock.sendall(size.to_bytes(8, "little"))
        view, got = memoryview(into.memory), 0
        while got < size:
            got += sock.recv_into(view[got : min(size, got + MB)])
        view.release()
        return time.perf_counter() - begun


if __name__ == "__main__":
    main()
