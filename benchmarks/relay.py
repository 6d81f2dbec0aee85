"""How many tokens a second one gateway process passes on: to 256 streams, one event per token.

    python -m benchmarks.relay [--quick] [--json FILE]

Ours is the real application (dispatcher, live requests, detokenising, events, uvicorn with our Connection) in a
process of its own. Its workers are fakes inside it that make a step of tokens, one for each sequence, as soon as the
step before has been taken. The yardstick is a bare ASGI application under the same server settings that sends the same
events to the same clients. The clients are this process: it counts events and compares their text with what was asked.
Rounds alternate.

The yardstick is the echo in turns: event k of every stream leaves before event k + 1 of any. So tokens come from an
engine, a step at a time, and whoever relays them has one write for each stream and step. The echo at once sends a
stream's events one after the other without a wait; the server makes a single write of them, which nobody can who does
not yet have the next token. It is told beside, as what writing and waking cost, and judges nothing.

Answers of two lengths tell apart what a token costs and what a request does, whatever its length: in CPU time of the
server, since its share of a busy machine varies. The longer ones are judged.
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
LENGTHS = (64, 256)  # tokens of an answer; the last is judged
OURS, IN_TURNS, AT_ONCE = KINDS = ("ours", "echo in turns", "echo at once")


@dataclass(frozen=True, slots=True)
class Round:
    num_tokens: int  # of an answer
    took_s: float
    cpu_s: float  # of the server
    num_events: int
    num_wrong: int  # streams that did not get what they had to

    @property
    def tokens_per_s(self) -> float:
        return NUM_STREAMS * self.num_tokens / self.took_s


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU time of the server."""

    token_us: float
    request_us: float  # beside its tokens


Results = dict[tuple[str, int], list[Round]]  # by kind and length, in order of the rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rounds instead of seven")
    parser.add_argument("--json", metavar="FILE", help="write rows and targets there too")
    options = parser.parse_args()
    results = uvloop.run(measure(3 if options.quick else 7))
    rows = [row(kind, num_tokens, results[kind, num_tokens]) for kind in KINDS for num_tokens in LENGTHS]
    print_table(f"Relay to {NUM_STREAMS} streams; {machine()}", rows)
    costs: list[Row] = [cost_row(kind, costs_of(results, kind)) for kind in KINDS]
    print_table("CPU of the server: what a token costs, and what a request costs beside its tokens", costs)
    for num_tokens in LENGTHS:
        over = [f"over the {kind} {spread(ratios(results, kind, num_tokens), digits=2)}" for kind in KINDS[1:]]
        print(f"ours, {num_tokens} tokens a stream: {', '.join(over)}")
    judged = LENGTHS[-1]
    targets = [
        target("relay", "over echo in turns", median(ratios(results, IN_TURNS, judged))),
        target("relay", "tokens/s", median([one.tokens_per_s for one in results[OURS, judged]])),
        target("relay", "wrong streams", sum(one.num_wrong for rounds in results.values() for one in rounds)),
    ]
    print_targets(targets)
    write_json(options.json, rows + costs, targets)


def row(kind: str, num_tokens: int, rounds: list[Round]) -> Row:
    num_asked = len(rounds) * NUM_STREAMS * num_tokens
    cpu_us = [one.cpu_s / (NUM_STREAMS * num_tokens) * 1e6 for one in rounds]
    return {
        "kind": kind,
        "tokens a stream": num_tokens,
        "tokens/s": spread([one.tokens_per_s for one in rounds], digits=0),
        "server CPU, us per token": spread(cpu_us, digits=1),
        "events per token": f"{sum(one.num_events for one in rounds) / num_asked:.3f}",
        "wrong streams": sum(one.num_wrong for one in rounds),
    }


def cost_row(kind: str, costs: list[Cost]) -> Row:
    return {
        "kind": kind,
        "us per token": spread([one.token_us for one in costs], digits=1),
        "us per request": spread([one.request_us for one in costs], digits=0),
    }


def costs_of(results: Results, kind: str) -> list[Cost]:
    """Of each round: the line through its two lengths."""
    few, many = LENGTHS
    costs: list[Cost] = []
    for short, long in zip(results[kind, few], results[kind, many], strict=True):
        short_us, long_us = (one.cpu_s / NUM_STREAMS * 1e6 for one in (short, long))
        token_us = (long_us - short_us) / (many - few)
        costs.append(Cost(token_us, short_us - few * token_us))
    return costs


def ratios(results: Results, kind: str, num_tokens: int) -> list[float]:
    """Ours over this echo, round by round."""
    pairs = zip(results[OURS, num_tokens], results[kind, num_tokens], strict=True)
    return [ours.tokens_per_s / echo.tokens_per_s for ours, echo in pairs]


async def measure(num_rounds: int) -> Results:
    servers = {kind: start_server(kind) for kind in KINDS}
    results: Results = {(kind, num_tokens): [] for kind in KINDS for num_tokens in LENGTHS}
    try:
        for server in servers.values():
            await one_round(*server, LENGTHS[0])  # warm
        for number in range(num_rounds):
            for num_tokens in LENGTHS:
                for kind in (*KINDS[number % 3 :], *KINDS[: number % 3]):
                    results[kind, num_tokens].append(await one_round(*servers[kind], num_tokens))
    finally:
        for process, _ in servers.values():
            process.kill()
            process.wait()
    return results


def start_server(kind: str) -> tuple[subprocess.Popen[str], int]:
    """The process, and the port it listens on."""
    command = [sys.executable, "-m", "benchmarks.relay_server", kind]
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
    return Round(num_tokens, took_s, used_s, sum(len(texts) for texts in told), wrong)


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
