"""How much of the way of KV from prefill to decode a client sees: the hand-off gap of long prompts.

    python -m benchmarks.overlap [--quick] [--json FILE]

Starts `steelyard serve` with configs/local.yaml (prefix cache off), and streams prompts of 512 and 2,048 tokens one at
a time. The hand-off gap is the time from the first to the second token less one decode step; it may be two decode
steps, or 5 % of TTFT where that is more. The floor is 0: all blocks but the last chunk's can have moved before it ends.
"""

from __future__ import annotations

import argparse
import asyncio

import httpx
import numpy as np

from benchmarks.report import Row, Target, machine, median, print_table, print_targets, spread, target, write_json
from benchmarks.serve import WITHOUT_CACHE, Cluster, StreamTimes, stream

LENGTHS = (512, 2048)  # tokens
ROUNDS, QUICK_ROUNDS = 7, 3
MAX_TOKEN_ID = 40_000  # below the vocabulary of the default model, past its special tokens
FIRST_TOKEN_ID = 100
STEPS_ALLOWED, TTFT_ALLOWED = 2, 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds: under a minute")
    parser.add_argument("--json", metavar="FILE", help="write rows and targets there too")
    options = parser.parse_args()
    with Cluster(WITHOUT_CACHE) as cluster:
        times = asyncio.run(measure(cluster.url, QUICK_ROUNDS if options.quick else ROUNDS))
    rows = [_row(length, found) for length, found in times.items()]
    print_table(f"One stream at a time through 1 prefill + 1 decode worker, float32; {machine()}", rows)
    targets = [_target(length, found) for length, found in times.items()]
    print_targets(targets)
    write_json(options.json, rows, targets)


async def measure(url: str, rounds: int) -> dict[int, list[StreamTimes]]:
    """Of each length, in turn; the same prompt must give the same text each time."""
    numbers = np.random.default_rng(0)
    prompts = {length: numbers.integers(FIRST_TOKEN_ID, MAX_TOKEN_ID, length).tolist() for length in LENGTHS}
    times: dict[int, list[StreamTimes]] = {length: [] for length in LENGTHS}
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        await stream(client, model, prompts[LENGTHS[0]])  # warm
        for _ in range(rounds):
            for length, prompt in prompts.items():
                one = await stream(client, model, prompt)
                if times[length] and one.text != times[length][0].text:
                    raise SystemExit(f"wrong: the text after {length} tokens is not what it was")
                times[length].append(one)
    return times


def gap(one: StreamTimes) -> float:
    """Seconds."""
    return one.second - one.tpot


def allowance(one: StreamTimes) -> float:
    """Seconds that the gap may have."""
    return max(STEPS_ALLOWED * one.tpot, TTFT_ALLOWED * one.ttft)


def _target(length: int, found: list[StreamTimes]) -> Target:
    return target(
        "overlap", f"gap over allowance, {length} tokens", median([gap(one) / allowance(one) for one in found])
    )


def _row(length: int, found: list[StreamTimes]) -> Row:
    return {
        "prompt tokens": length,
        "TTFT ms": spread([1e3 * one.ttft for one in found], digits=0),
        "hand-off gap ms": spread([1e3 * gap(one) for one in found]),
        "decode step ms": spread([1e3 * one.tpot for one in found]),
        "allowed ms": spread([1e3 * allowance(one) for one in found]),
    }


if __name__ == "__main__":
    main()
