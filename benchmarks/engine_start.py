"""From the start of an engine's process to its first token: Python, imports, weights, one step. No Ray, no cluster.

    python -m benchmarks.engine_start [--quick] [--dtype bfloat16] [--threads N] [--json FILE]

The model's files and our compiled kernels are in their caches: the first start of all is not counted.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from benchmarks.report import Row, machine, median, print_table, print_targets, spread, target, write_json

PROMPT = (1, 2, 3)


def main() -> None:
    options = _options()
    if options.child:
        first_token(options.dtype, options.threads)
        return
    starts = [_start(options) for _ in range(3 if options.quick else 7)][1:]
    row: Row = {
        "type": options.dtype, "threads": options.threads, "starts": len(starts), "first token s": spread(starts)
    }  # fmt: skip
    print_table(machine(), [row])
    targets = [target("engine_start", "first token s", median(starts))]
    print_targets(targets)
    write_json(options.json, [row], targets)


def first_token(dtype: str, threads: int) -> None:
    from engine.build import build_engine
    from engine.config import EngineConfig, ModelSource
    from engine.setup import plan_engine
    from engine.types import Add, Request, SamplingParams

    source = ModelSource.model_validate({"dtype": dtype})
    built = build_engine(plan_engine(source, EngineConfig(threads=threads), hash_key=bytes(16)), None)
    built.engine.handle(Add(Request("first", PROMPT, SamplingParams(max_tokens=1, temperature=0.0))))
    batch = built.engine.begin()
    assert batch is not None
    built.engine.finish(batch, built.runner.execute(batch))
    print(*built.engine.take_outputs().tokens[0].token_ids, flush=True)


def _start(options: argparse.Namespace) -> float:
    """Seconds until the token is read here."""
    command = [sys.executable, "-m", "benchmarks.engine_start", "--child", "--dtype", options.dtype]
    begun = time.perf_counter()
    with subprocess.Popen([*command, "--threads", str(options.threads)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        seconds = time.perf_counter() - begun
    if not line.strip().isdigit():
        raise SystemExit("wrong: the engine gave no token")
    return seconds


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three starts")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", metavar="FILE", help="write rows and targets there too")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
