"""How many tokens a second one gateway process passes on: to 256 streams, one event per token.

    python -m benchmarks.relay [--quick] [--json FILE]

Ours is the real application (dispatcher, live requests, detokenising, events, uvicorn with our Connection) in a
process of its own. Its workers are fakes inside it that make a step of tokens, one for each sequence, as soon as the
step before has been taken. The yardstick is a bare ASGI application under the same server settings that sends the same
events to the same clients, in turns (an event for each stream, and again) or at once (a stream's events one after the
other). The clients are this process: it counts events and compares their text with what was asked. Rounds alternate.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import uvloop

from benchmarks.report import Row, machine, median, print_table, print_targets, spread, target, write_json

NUM_STREAMS = 256
NUM_TOKENS = 256
KINDS = ("ours", "echo in turns", "echo at once")


@dataclass(frozen=True, slots=True)
class Round:
    tokens_per_s: float
    cpu_us: float  # of the server, per token
    num_events: int
    num_wrong: int  # streams that did not get what they had to


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds of 64 tokens")
    parser.add_argument("--json", metavar="FILE", help="write rows and targets there too")
    options = parser.parse_args()
    rounds, num_tokens = (2, 64) if options.quick else (7, NUM_TOKENS)
    results = uvloop.run(measure(rounds, num_tokens))
    num_asked = rounds * NUM_STREAMS * num_tokens
    rows: list[Row] = [
        {
            "kind": kind,
            "tokens/s": spread([one.tokens_per_s for one in results[kind]], digits=0),
            "server CPU, us per token": spread([one.cpu_us for one in results[kind]], digits=1),
            "events per token": f"{sum(one.num_events for one in results[kind]) / num_asked:.3f}",
            "wrong streams": sum(one.num_wrong for one in results[kind]),
        }
        for kind in KINDS
    ]
    print_table(f"Relay to {NUM_STREAMS} streams of {num_tokens} tokens; {machine()}", rows)
    ratios = [
        ours.tokens_per_s / max(turns.tokens_per_s, once.tokens_per_s)
        for ours, turns, once in zip(*(results[kind] for kind in KINDS), strict=True)
    ]
    in_turns = [
        ours.tokens_per_s / turns.tokens_per_s
        for ours, turns in zip(*(results[kind] for kind in KINDS[:2]), strict=True)
    ]
    print(f"ours over the faster echo {spread(ratios, digits=2)}, over the one in turns {spread(in_turns, digits=2)}")
    targets = [
        target("relay", "over echo", median(ratios)),
        target("relay", "tokens/s", median([one.tokens_per_s for one in results["ours"]])),
        target("relay", "wrong streams", sum(one.num_wrong for kind in KINDS for one in results[kind])),
    ]
    print_targets(targets)
    write_json(options.json, rows, targets)


async def measure(rounds: int, num_tokens: int) -> dict[str, list[Round]]:
    servers = {kind: start_server(kind, num_tokens) for kind in KINDS}
    results: dict[str, list[Round]] = {kind: [] for kind in KINDS}
    try:
        for server in servers.values():
            await one_round(*server, num_tokens)  # warm
        for number in range(rounds):
            for kind in (*KINDS[number % 3 :], *KINDS[: number % 3]):
                results[kind].append(await one_round(*servers[kind], num_tokens))
    finally:
        for process, _ in servers.values():
            process.kill()
            process.wait()
    return results


def start_server(kind: str, num_tokens: int) -> tuple[subprocess.Popen[str], int]:
    """The process, and the port it listens on."""
    command = [sys.executable, "-m", "benchmarks.relay_server", kind, str(num_tokens)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


class Client(asyncio.Protocol):
    """Posts one request and collects the answer until the server closes."""

    def __init__(self, num_tokens: int, is_over: asyncio.Future[bytes]) -> None:
        self._is_over = is_over
        self._parts: list[bytes] = []
        body = json.dumps({"model": "m", "prompt": [65], "max_tokens": num_tokens, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: h\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        self._request = head.encode() + body

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        self._parts.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_over.set_result(b"".join(self._parts))


async def one_round(server: subprocess.Popen[str], port: int, num_tokens: int) -> Round:
    loop = asyncio.get_running_loop()
    futures: list[asyncio.Future[bytes]] = [loop.create_future() for _ in range(NUM_STREAMS)]
    begun, cpu_before_s = time.perf_counter(), cpu_s(server.pid)
    for future in futures:
        await loop.create_connection(lambda future=future: Client(num_tokens, future), "127.0.0.1", port)
    async with asyncio.timeout(120):
        answers = await asyncio.gather(*futures)
    took_s, used_s = time.perf_counter() - begun, cpu_s(server.pid) - cpu_before_s
    told = [texts_of(answer) for answer in answers]
    wrong = sum("".join(texts) != "B" * num_tokens for texts in told)
    count = NUM_STREAMS * num_tokens
    return Round(count / took_s, used_s / count * 1e6, sum(len(texts) for texts in told), wrong)


def cpu_s(pid: int) -> float:
    """What a process has used so far, in user and in kernel mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def texts_of(answer: bytes) -> list[str]:
    """Of each event that has text."""
    lines = [line for line in answer.split(b"\n") if line.startswith(b"data: {")]
    texts = [json.loads(line.removeprefix(b"data: "))["choices"][0]["text"] for line in lines]
    return [text for text in texts if text]


if __name__ == "__main__":
    main()
