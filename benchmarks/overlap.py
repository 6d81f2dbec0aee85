"""How much of the way of KV from prefill to decode a client sees: the hand-off gap, and what of a transfer was hidden.

    python -m benchmarks.overlap [--quick] [--json FILE]

Starts `steelyard serve` with configs/local.yaml (prefix cache off), once as it is and once with whole steps only
(`kv_transfer.layer_group_bytes: 0`), and streams prompts of 200, 512 and 2,048 tokens one at a time; those of 200 are
one step. The hand-off gap is the time from the first to the second token less one decode step; it may be two decode
steps, or 5 % of TTFT where that is more. Hidden is what had arrived when the first token was sampled, of all KV bytes;
exposed is the time from then to the COMMIT. Both are the gateway's ledger's. The floor is 0: all but the last layers of
the last chunk can have moved before it ends.
"""

from __future__ import annotations

import argparse
import asyncio
import re
from dataclasses import dataclass

import httpx
import numpy as np

from benchmarks.report import Row, Target, machine, median, print_table, print_targets, spread, target, write_json
from benchmarks.serve import WITHOUT_CACHE, Cluster, StreamTimes, stream

LENGTHS = (200, 512, 2048)  # tokens
PROMISED = (512, 2048)
WAYS: dict[str, dict[str, object]] = {"by layers": {}, "whole steps": {"layer_group_bytes": 0}}
ROUNDS, QUICK_ROUNDS = 7, 3
MAX_TOKEN_ID = 40_000  # below the vocabulary of the default model, past its special tokens
FIRST_TOKEN_ID = 100
STEPS_ALLOWED, TTFT_ALLOWED = 2, 0.05
LEDGER_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class HandOffTimes:
    """One stream, and what the ledger tells of its transfer."""

    stream: StreamTimes
    hidden_share: float
    exposed_s: float

    @property
    def gap_s(self) -> float:
        return self.stream.second - self.stream.tpot

    @property
    def allowance_s(self) -> float:
        """What the gap may be."""
        return max(STEPS_ALLOWED * self.stream.tpot, TTFT_ALLOWED * self.stream.ttft)


Times = dict[int, list[HandOffTimes]]  # by the prompt's length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds: about two minutes")
    parser.add_argument("--json", metavar="FILE", help="write rows and targets there too")
    options = parser.parse_args()
    times = measure_ways(QUICK_ROUNDS if options.quick else ROUNDS)
    rows = [_row(length, way, times[way][length]) for length in LENGTHS for way in WAYS]
    print_table(f"One stream at a time through 1 prefill + 1 decode worker, float32; {machine()}", rows)
    targets = [_target(length, times["by layers"][length]) for length in PROMISED]
    print_targets(targets)
    write_json(options.json, rows, targets)


def measure_ways(rounds: int) -> dict[str, Times]:
    """The same prompt must give the same text each time, whatever way its KV goes."""
    times: dict[str, Times] = {}
    for way, kv_transfer in WAYS.items():
        with Cluster(WITHOUT_CACHE, kv_transfer=kv_transfer) as cluster:
            times[way] = asyncio.run(measure(cluster.url, rounds))
    for length in LENGTHS:
        texts = dict.fromkeys(one.stream.text for found in times.values() for one in found[length])
        if len(texts) > 1:
            raise SystemExit(f"wrong: there are {len(texts)} texts after the same {length} tokens")
    return times


async def measure(url: str, rounds: int) -> Times:
    """Of each length, in turn."""
    numbers = np.random.default_rng(0)
    prompts = {length: numbers.integers(FIRST_TOKEN_ID, MAX_TOKEN_ID, length).tolist() for length in LENGTHS}
    times: Times = {length: [] for length in LENGTHS}
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        await one_stream(client, model, prompts[LENGTHS[0]])  # warm
        for _ in range(rounds):
            for length, prompt in prompts.items():
                times[length].append(await one_stream(client, model, prompt))
    return times


async def one_stream(client: httpx.AsyncClient, model: str, prompt: list[int]) -> HandOffTimes:
    count, hidden, exposed_s = await _ledgers(client)
    streamed = await stream(client, model, prompt)
    async with asyncio.timeout(LEDGER_TIMEOUT_S):
        while (after := await _ledgers(client))[0] == count:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return HandOffTimes(streamed, after[1] - hidden, after[2] - exposed_s)


async def _ledgers(client: httpx.AsyncClient) -> tuple[float, float, float]:
    """Of all transfers so far, by any carrier: how many, and their hidden shares and exposed seconds, summed."""
    metrics = (await client.get("/metrics")).text

    def total(name: str) -> float:
        return sum(map(float, re.findall(rf"^steelyard_kv_transfer_{name}{{.*}} (\S+)$", metrics, re.M)))

    return total("hidden_ratio_count"), total("hidden_ratio_sum"), total("exposed_seconds_sum")


def _target(length: int, found: list[HandOffTimes]) -> Target:
    ratios = [one.gap_s / one.allowance_s for one in found]
    return target("overlap", f"gap over allowance, {length} tokens", median(ratios))


def _row(length: int, way: str, found: list[HandOffTimes]) -> Row:
    return {
        "prompt tokens": length,
        "KV leaves": way,
        "TTFT ms": spread([1e3 * one.stream.ttft for one in found], digits=0),
        "hand-off gap ms": spread([1e3 * one.gap_s for one in found]),
        "decode step ms": spread([1e3 * one.stream.tpot for one in found]),
        "allowed ms": spread([1e3 * one.allowance_s for one in found]),
        "hidden %": spread([100 * one.hidden_share for one in found]),
        "exposed ms": spread([1e3 * one.exposed_s for one in found]),
    }


if __name__ == "__main__":
    main()
