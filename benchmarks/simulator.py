"""The simulator: how fast it is, that it repeats itself, and how near it comes to Dynamo's replay.

    python -m benchmarks.simulator [--quick] [--rows azure,repeat,dynamo] [--json FILE]

- azure: one hour of the Azure conversation trace on 8 prefill and 8 decode workers of an H200, on one core, with the
  memory at its peak. Floor: as many callbacks of a virtual loop that do nothing;
- repeat: the event log of the same seed in two processes with different hash seeds, and with and without bursts;
- dynamo: both Mooncake traces on 4 prefill and 4 decode workers against `python -m dynamo.replay` of the same table,
  round robin, first come first served, no admission. Installs ai-dynamo into an environment of its own, once.

Dynamo counts the first token when the decode worker has made it, a decode step after the prompt is done; ours comes
with the prompt. So its time to the first token is compared with our time to the first token of a decode step, and the
plain ratio is shown beside. Traces and tables are read from ../shared/data; without them there is nothing to run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.report import Row, Target, machine, print_table, print_targets, target, write_json
from cluster.config import ClusterConfig
from cluster.simulator.clock import run_virtual
from cluster.simulator.log import EventLog
from cluster.simulator.network import LinkTimes
from cluster.simulator.play import simulate
from cluster.simulator.results import SimulationResult
from cluster.simulator.service_times.load import load_service_times
from cluster.simulator.spec import WorldSpec
from cluster.simulator.workloads.load import load_workload

DATA = Path("../shared/data")
TABLE = DATA / "service-times/h200-llama-3.1-8b-fp8/mocker_perf_data.npz"
TRACES = {
    "azure": "azure-conv-2023/AzureLLMInferenceTrace_conv.csv",
    "conversation": "mooncake/conversation_first_half.jsonl",
    "synthetic": "mooncake/synthetic_trace.jsonl",
}
NUM_BLOCKS, BLOCK_SIZE = 14766, 64  # 945,029 KV tokens per GPU
MOST_TOKENS = 8192  # in a step: the mocker's own limit
PEERS = Path("~/.cache/steelyard/peers").expanduser()
DYNAMO = ("ai-dynamo==1.2.1", "ai-dynamo-runtime==1.2.1")  # --no-deps
DYNAMO_NEEDS = ("pydantic==2.12.5", "msgspec==0.20.0")
QUICK_REQUESTS = 400
DYNAMO_POOL = 4  # workers of each kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"only {QUICK_REQUESTS} requests of each trace")
    parser.add_argument("--rows", default="azure,repeat,dynamo", help="which, separated by commas")
    parser.add_argument("--json", metavar="FILE", help="write rows and targets there too")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a simulation of its own process
    options = parser.parse_args()
    if options.one:
        print(json.dumps(_one(**json.loads(options.one))))
        return
    if not TABLE.exists():
        sys.exit(f"{TABLE} is not here: nothing to run")
    most = QUICK_REQUESTS if options.quick else None
    rows: list[Row] = []
    targets: list[Target] = []
    runs = {"azure": _azure, "repeat": _repeat, "dynamo": _dynamo}
    for name in options.rows.split(","):
        found, promised = runs[name](most)
        print_table(f"{name} ({machine()})", found)
        rows += found
        targets += [] if options.quick else promised
    print_targets(targets)
    write_json(options.json, rows, targets)


# --- rows -----------------------------------------------------------------------------------------------------


def _azure(most: int | None) -> tuple[list[Row], list[Target]]:
    half, whole = (_run(trace="azure", most=number) for number in ((most or 19366) // 2, most))
    floor_s = whole["num_events"] * whole["callback_s"]
    row: Row = {
        "trace": "azure", "requests": whole["num_requests"], "virtual s": round(whole["span_s"]),
        "steps": whole["num_steps"], "CPU s": round(whole["cpu_s"], 1), "wall s": round(whole["wall_s"], 1),
        "ms/request": round(1e3 * whole["cpu_s"] / whole["num_requests"], 2),
        "events' floor s": round(floor_s, 1), "peak MB": whole["peak_mb"], "peak MB at half": half["peak_mb"],
        "errors": whole["num_errors"],
    }  # fmt: skip
    assert not whole["num_errors"], "every request is answered"
    return [row], [
        target("simulator", "azure hour, wall s", whole["wall_s"]),
        target("simulator", "azure hour, peak MB", whole["peak_mb"]),
    ]


def _repeat(most: int | None) -> tuple[list[Row], list[Target]]:
    number = min(most or 1000, 1000)
    runs = [_run(trace="azure", most=number, hash_seed=seed, detailed=True) for seed in (1, 2)]
    single = _run(trace="azure", most=min(number, 200), bursts=False, detailed=True)
    together = _run(trace="azure", most=min(number, 200), detailed=True)
    rows: list[Row] = [
        {"log": "two hash seeds", "records": runs[0]["num_records"], "equal": runs[0]["digest"] == runs[1]["digest"]},
        {"log": "bursts or not", "records": single["num_records"], "equal": single["sorted"] == together["sorted"]},
    ]
    return rows, [target("simulator", "equal logs", sum(bool(row["equal"]) for row in rows) / len(rows))]


def _dynamo(most: int | None) -> tuple[list[Row], list[Target]]:
    python = dynamo_python()
    rows: list[Row] = []
    targets: list[Target] = []
    for trace in ("conversation", "synthetic"):
        ours, theirs = _run(trace=trace, most=most, dynamo=True), replay(python, trace, most)
        assert ours["num_requests"] == theirs["num_requests"] and not ours["num_errors"]
        pairs = {
            "TTFT P50": (ours["decoded_p50_ms"], theirs["median_ttft_ms"]),
            "ITL P50": (ours["itl_p50_ms"], theirs["median_itl_ms"]),
        }
        plain = {
            "first token P50": (ours["ttft_p50_ms"], theirs["median_ttft_ms"]),
            "TTFT mean": (ours["decoded_mean_ms"], theirs["mean_ttft_ms"]),
            "TPOT P50": (ours["tpot_p50_ms"], theirs["median_tpot_ms"]),
            "TPOT P90": (ours["tpot_p90_ms"], theirs["p90_tpot_ms"]),
            "cached share": (ours["cached_share"], theirs["prefix_cache_reused_ratio"]),
        }
        for name, (our, their) in (pairs | plain).items():
            rows.append({"trace": trace, "figure": name, "ours": round(our, 3), "Dynamo": round(their, 3),
                         "ratio": round(our / their, 3)})  # fmt: skip
        targets += [
            target("simulator", f"{trace} {name}, difference", abs(our / their - 1))
            for name, (our, their) in pairs.items()
        ]
    return rows, targets


# --- one simulation, in a process of its own -------------------------------------------------------------------


def _run(hash_seed: int = 0, **arguments: Any) -> dict[str, Any]:
    """On one core."""
    command = [sys.executable, "-m", "benchmarks.simulator", "--one", json.dumps(arguments)]
    environment = os.environ | {"PYTHONHASHSEED": str(hash_seed)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def _one(
    trace: str, most: int | None, bursts: bool = True, detailed: bool = False, dynamo: bool = False
) -> dict[str, Any]:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    logging.disable(logging.WARNING)
    spec = dynamo_spec() if dynamo else _spec(bursts)
    path = DATA / "traces" / TRACES[trace]
    source = f"trace:path={path},spread=none" if dynamo else str(path)
    workload = load_workload(source, 0, max_requests=most)
    log = EventLog(keep=detailed, detailed=detailed)
    begun = time.perf_counter(), time.process_time()
    result = simulate(spec, workload, log)
    wall_s, cpu_s = time.perf_counter() - begun[0], time.process_time() - begun[1]
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    figures = _figures(result) | {"wall_s": wall_s, "cpu_s": cpu_s, "peak_mb": peak_mb}
    figures |= {"num_records": log.num_records, "callback_s": _callback_s()}
    if detailed:
        figures["sorted"] = "\n".join(sorted(log.to_bytes().decode().splitlines()))
    return figures


def _figures(result: SimulationResult) -> dict[str, Any]:
    requests = result.requests
    ttfts = [request.ttft_s for request in requests if request.ttft_s is not None]
    decoded = [one.ttft_s + (one.gap_s or 0.0) for one in requests if one.ttft_s is not None]
    tpots = [request.tpot_s for request in requests if request.tpot_s is not None]
    return {
        "num_requests": len(requests),
        "num_errors": sum(bool(request.error) for request in requests),
        "span_s": result.span_s,
        "num_steps": result.num_steps,
        "num_events": result.num_events,
        "digest": result.digest,
        "ttft_p50_ms": 1e3 * statistics.median(ttfts),
        "decoded_p50_ms": 1e3 * statistics.median(decoded),
        "decoded_mean_ms": 1e3 * statistics.mean(decoded),
        "tpot_p50_ms": 1e3 * statistics.median(tpots),
        "tpot_p90_ms": 1e3 * statistics.quantiles(tpots, n=10)[8],
        "itl_p50_ms": 1e3 * (result.gaps.quantile(0.5) or 0.0),
        "cached_share": sum(one.cached_tokens for one in requests) / sum(one.num_prompt for one in requests),
    }


def _spec(bursts: bool) -> WorldSpec:
    config = _config(8, {"max_batch_tokens": 16384, "prefill_chunk": 8192}, {})
    times = load_service_times(str(TABLE))
    return WorldSpec(1, config, times, plain=True, bursts=bursts, frame_bytes=2**27)


def dynamo_spec() -> WorldSpec:
    """As its replay has it: no admission, no network, and whoever comes first is served first: no prompt is long, so
    that none is passed, and the engine has them all, so that no queue before it sorts them by what they take."""
    router = {"policy": "round_robin", "max_live_requests": 10**6, "deadline_s": 10**6}
    spec = like_dynamo(DYNAMO_POOL, {"router": router, "prefill": {"max_queue": 10**6, "knee_tokens": 2**20}})
    engine = spec.config.engine.model_copy(update={"prefill_chunk": 2**18})  # a step has MOST_TOKENS all the same
    return replace(spec, config=spec.config.model_copy(update={"engine": engine}))


def like_dynamo(pool: int, others: Mapping[str, object]) -> WorldSpec:
    """Its times, its engine's limits, and no network."""
    engine = {"max_batch_tokens": MOST_TOKENS, "prefill_chunk": MOST_TOKENS, "max_overtaken": 0}
    config = _config(pool, engine, others)
    nothing = LinkTimes(latency_s=1e-6, bytes_per_s=float("inf"))
    times = load_service_times(f"{TABLE}:dynamo")
    return WorldSpec(1, config, times, nothing, plain=True, frame_bytes=2**34)


def _config(pool: int, engine: Mapping[str, object], others: Mapping[str, object]) -> ClusterConfig:
    blocks = {"num_blocks": NUM_BLOCKS, "block_size": BLOCK_SIZE, "max_batch_seqs": 256}
    pools = {"prefill": {"workers": pool}, "decode": {"workers": pool}}
    model = {"max_context": 2**18}
    decode = {"max_pulls": 256}
    return ClusterConfig.model_validate(
        {"engine": {**blocks, **engine}, "pools": pools, "model": model, "decode": decode, **others}
    )


def _callback_s() -> float:
    """One callback of an empty virtual loop: what an event costs at least."""
    number = 100_000

    async def main() -> float:
        begun = time.process_time()
        for _ in range(number):
            await asyncio.sleep(0)
        return (time.process_time() - begun) / number

    return run_virtual(main())


# --- Dynamo's replay -------------------------------------------------------------------------------------------


def dynamo_python() -> Path:
    """The interpreter of an environment that has it."""
    folder = PEERS / DYNAMO[0].replace("==", "-")
    python = folder / "bin/python"
    if not (folder / "complete").exists():
        venv.create(folder, with_pip=True, clear=True)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        print(f"installing {' and '.join(DYNAMO)} into {folder}")
        for packages in (("--no-deps", *DYNAMO), DYNAMO_NEEDS):  # its own list of dependencies needs a GPU's worth
            done = subprocess.run([*install, *packages], capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
        (folder / "complete").touch()
    return python


@dataclass(frozen=True, slots=True)
class Replay:
    """`speedup`: of the arrivals."""

    num_prefill: int = DYNAMO_POOL
    num_decode: int = DYNAMO_POOL
    speedup: float = 1


def replay(python: Path, trace: str, most: int | None, how: Replay = Replay()) -> dict[str, Any]:
    """Dynamo's report."""
    with tempfile.TemporaryDirectory() as folder:
        path, report = Path(folder) / "trace.jsonl", Path(folder) / "report.json"
        lines = (DATA / "traces" / TRACES[trace]).read_text().splitlines(keepends=True)
        path.write_text("".join(lines[:most]))
        command = [python, "-m", "dynamo.replay", path, *_replay_flags(how), "--report-json", report]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return json.loads(report.read_text())


def _replay_flags(how: Replay) -> Sequence[str]:
    def engine(kind: str) -> str:
        table = str(TABLE.resolve())
        blocks = {"block_size": BLOCK_SIZE, "num_gpu_blocks": NUM_BLOCKS}
        return json.dumps({"worker_type": kind, "planner_profile_data": table} | blocks)

    pools = ("--num-prefill-workers", str(how.num_prefill), "--num-decode-workers", str(how.num_decode))
    modes = ("--router-mode", "round_robin", "--replay-mode", "offline", "--arrival-speedup-ratio", f"{how.speedup:g}")
    engines = ("--prefill-engine-args", engine("prefill"), "--decode-engine-args", engine("decode"))
    return ("--trace-block-size", "512", *pools, *modes, *engines)


if __name__ == "__main__":
    main()
