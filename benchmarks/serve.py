"""What a user of the local cluster waits for: TTFT, hand-off gap, TPOT, and the time until it is ready.

    python -m benchmarks.serve [--quick] [--json FILE]

Starts `steelyard serve` with configs/local.yaml (prefix cache off, so that every prompt is computed), measures the
start, then streams completions over HTTP at 1, 4 and 16 at a time. Each stream's text must be the same at every
concurrency: in float32 tokens do not depend on the batch. Medians over rounds; the spread beside them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import yaml

from benchmarks.report import Row, machine, median, print_table, spread, write_json
from benchmarks.texts import prompt_texts

CONCURRENCIES = (1, 4, 16)
PROMPT_CHARS = 480  # about 110 tokens
NUM_TOKENS = 48
START_TIMEOUT_S = 240
WITHOUT_CACHE: dict[str, object] = {"prefix_cache": False}
MODEL_BYTES = 134_515_008 * 4  # SmolLM2-135M in float32: what one decode step reads at least


@dataclass(frozen=True, slots=True)
class StreamTimes:
    """One streamed completion, in seconds, as its client saw it."""

    ttft: float
    second: float  # first to second piece of text
    tpot: float
    text: str
    num_prompt: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one start, one round: under a minute")
    parser.add_argument("--json", metavar="FILE", help="write rows and targets there too")
    options = parser.parse_args()
    starts, rounds = (1, 1) if options.quick else (5, 5)
    ready = [measure_start() for _ in range(starts - 1)]
    with Cluster(WITHOUT_CACHE) as cluster:
        ready.append(cluster.ready_s)
        rows, source = asyncio.run(measure_streams(cluster.url, rounds))
    floor_ms = MODEL_BYTES / read_bandwidth() * 1e3
    print_table(f"Local cluster, 1 prefill + 1 decode worker, one thread each, float32; {machine()}; {source}", rows)
    print(f"ready after {spread(ready, ' s')} from the command, {len(ready)} starts")
    print(f"floor of a decode step: {floor_ms:.1f} ms (weights read once by one thread)")
    rows.append({"streams": "ready", "ready_s": median(ready)})
    rows.append({"streams": "floor", "decode_step_ms": floor_ms})
    write_json(options.json, rows, [])


async def measure_streams(url: str, rounds: int) -> tuple[list[Row], str]:
    texts, source = prompt_texts(max(CONCURRENCIES), PROMPT_CHARS)
    expected: dict[str, str] = {}
    times: dict[int, list[StreamTimes]] = {count: [] for count in CONCURRENCIES}
    medians: dict[int, list[tuple[float, float, float]]] = {count: [] for count in CONCURRENCIES}
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        await stream(client, model, texts[0])  # warm
        for _ in range(rounds):
            for count in CONCURRENCIES:
                got = await asyncio.gather(*(stream(client, model, text) for text in texts[:count]))
                for text, one in zip(texts, got, strict=False):
                    if expected.setdefault(text, one.text) != one.text:
                        raise SystemExit(f"wrong: at {count} streams the text is not what it was: {one.text!r}")
                times[count] += got
                medians[count].append(summary(got))
    return [_row(count, medians[count], times[count]) for count in CONCURRENCIES], source


def summary(got: list[StreamTimes]) -> tuple[float, float, float]:
    """Medians of TTFT, hand-off gap, TPOT over one round, in ms. The gap is first to second token less one step."""
    return (
        1e3 * median([one.ttft for one in got]),
        1e3 * median([one.second - one.tpot for one in got]),
        1e3 * median([one.tpot for one in got]),
    )


def _row(count: int, rounds: list[tuple[float, float, float]], times: list[StreamTimes]) -> Row:
    ttft, gap, tpot = zip(*rounds, strict=True)
    return {
        "streams": count,
        "prompt tokens": round(median([one.num_prompt for one in times])),
        "TTFT ms": spread(ttft, digits=0),
        "hand-off gap ms": spread(gap, digits=0),
        "TPOT ms": spread(tpot),
        "tokens/s": f"{count * 1e3 / median(tpot):.0f}",
    }


async def stream(client: httpx.AsyncClient, model: str, text: str | list[int]) -> StreamTimes:
    """One greedy completion of NUM_TOKENS tokens, after a text or token ids."""
    body = {
        "model": model, "prompt": text, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    begun, arrivals, pieces, usage = time.perf_counter(), [], [], {}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise SystemExit(f"wrong: HTTP {response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            usage = event.get("usage") or usage
            piece = "".join(choice["text"] for choice in event["choices"])
            if piece:
                arrivals.append(time.perf_counter())
                pieces.append(piece)
    if usage.get("completion_tokens") != NUM_TOKENS:
        raise SystemExit(f"wrong: {usage} where {NUM_TOKENS} tokens were asked for")
    tpot = (arrivals[-1] - arrivals[0]) / (NUM_TOKENS - 1)
    return StreamTimes(arrivals[0] - begun, arrivals[1] - arrivals[0], tpot, "".join(pieces), usage["prompt_tokens"])


class Cluster:
    """`steelyard serve` with configs/local.yaml and these settings instead, by section, as a child, on a port of the
    system's choice."""

    def __init__(self, engine: dict[str, object], **sections: dict[str, object]) -> None:
        self._sections = {"engine": engine, **sections}

    def __enter__(self) -> Cluster:
        self._folder = tempfile.TemporaryDirectory()
        config = Path(self._folder.name) / "bench.yaml"
        values = yaml.safe_load(Path("configs/local.yaml").read_text())
        for name, settings in self._sections.items():
            values[name] = values.get(name, {}) | settings
        values["router"]["port"] = 0
        config.write_text(yaml.safe_dump(values))
        begun = time.perf_counter()
        command = [sys.executable, "-m", "cluster", "serve", str(config)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"NO_COLOR": "1"})
        self.url = self._wait_for_url(begun + START_TIMEOUT_S)
        self.ready_s = time.perf_counter() - begun
        return self

    def _wait_for_url(self, deadline: float) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if time.perf_counter() > deadline:
                break
            if found := re.match(r"URL\s+(http://[\d.:]+)", line):
                return found[1]
        self._process.kill()
        raise SystemExit("wrong: the cluster did not become ready")

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.wait(60)
        self._folder.cleanup()


def measure_start() -> float:
    with Cluster(WITHOUT_CACHE) as cluster:
        return cluster.ready_s


def read_bandwidth() -> float:
    """Bytes per second that one thread reads from a buffer of the model's size (median of 5)."""
    buffer = np.ones(MODEL_BYTES // 8, dtype=np.float64)
    rates = []
    for _ in range(5):
        begun = time.perf_counter()
        buffer.sum()
        rates.append(buffer.nbytes / (time.perf_counter() - begun))
    return median(rates)


if __name__ == "__main__":
    main()
