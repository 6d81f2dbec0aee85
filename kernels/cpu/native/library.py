"""The C++ code as a library: compiled once for a machine, kept in the user's cache, called through ctypes.

1. The name of the file is a digest of the sources, the compiler and the processor's features.
2. Processes that want it at the same time wait for the first, which compiles it in some ten seconds.
3. Without AVX2, a compiler or a folder to write to there is none, which is told once; callers do without.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, c_float, c_int, c_long, c_void_p
from functools import cache
from pathlib import Path

import torch

_SOURCES = Path(__file__).parent
# Hidden: two libraries in one process, for other vectors, must not share what is static in their functions.
_FLAGS = ("-std=c++20", "-fno-math-errno", "-fPIC", "-fvisibility=hidden", "-pthread", "-w")
_PARTS = {"linear.cpp": "-O2", "nibbles.cpp": "-O3", "native.cpp": "-O3"}
_NEEDED = ("avx2", "fma", "f16c")
_AVX512 = {"avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_COMPILERS = ("c++", "g++")

NAMES = {torch.float32: "float", torch.bfloat16: "bf16"}  # of the functions for a type

_log = logging.getLogger("steelyard.kernels")


class WeightStruct(ctypes.Structure):
    """linear.h, Weight."""

    _fields_ = [
        ("panels", c_void_p), ("scales", c_void_p), ("bias", c_void_p), ("form", c_long), ("num_k", c_long),
        ("num_columns", c_long), ("group", c_long), ("finish", c_long),
    ]  # fmt: skip


class StoreStruct(ctypes.Structure):
    """layers.h, Store."""

    _fields_ = [
        ("q_norm", c_void_p), ("k_norm", c_void_p), ("k_cache", c_void_p), ("v_cache", c_void_p),
        ("positions", c_void_p), ("block_ids", c_void_p), ("cos", c_void_p), ("sin", c_void_p), ("num_rows", c_long),
        ("num_tokens", c_long), ("num_heads", c_long), ("num_kv_heads", c_long), ("head_dim", c_long),
        ("block_size", c_long), ("eps", c_float), ("is_wide", c_int),
    ]  # fmt: skip


class AttentionStruct(ctypes.Structure):
    """attention.h, Attention."""

    _fields_ = [
        ("q", c_void_p), ("k_cache", c_void_p), ("v_cache", c_void_p), ("out", c_void_p), ("spans", c_void_p),
        ("tables", c_void_p), ("num_spans", c_long), ("q_stride", c_long), ("num_heads", c_long),
        ("num_kv_heads", c_long), ("head_dim", c_long), ("block_size", c_long), ("window", c_long), ("scale", c_float),
    ]  # fmt: skip


class LayerStruct(ctypes.Structure):
    """decoder.h, Layer."""

    _fields_ = [
        *((name, POINTER(WeightStruct)) for name in ("qkv", "out", "gate_up", "down")),
        ("attention_norm", c_void_p), ("q_norm", c_void_p), ("k_norm", c_void_p), ("attention_out_norm", c_void_p),
        ("mlp_norm", c_void_p), ("mlp_out_norm", c_void_p), ("k_cache", c_void_p), ("v_cache", c_void_p),
        ("group", c_long),
    ]  # fmt: skip


class GroupStruct(ctypes.Structure):
    """decoder.h, Group."""

    _fields_ = [
        ("block_ids", c_void_p), ("tables", c_void_p), ("spans", c_void_p), ("cos", c_void_p), ("sin", c_void_p),
        ("num_spans", c_long), ("window", c_long),
    ]  # fmt: skip


class PassStruct(ctypes.Structure):
    """decoder.h, Pass."""

    _fields_ = [
        ("hidden", c_void_p), ("x", c_void_p), ("added", c_void_p), ("positions", c_void_p), ("groups", c_void_p),
        ("num_rows", c_long), ("width", c_long), ("num_heads", c_long), ("num_kv_heads", c_long), ("head_dim", c_long),
        ("block_size", c_long), ("scale", c_float), ("eps", c_float), ("is_wide", c_int), ("has_added", c_int),
    ]  # fmt: skip


class DrawsStruct(ctypes.Structure):
    """sampling.h, Draws."""

    _fields_ = [(name, c_void_p) for name in ("temperatures", "top_p", "min_p", "top_k", "keys", "positions")]


_NORM = (c_void_p, c_void_p, c_void_p, c_void_p, c_long, c_long, c_float, c_int)
_FUNCTIONS = {
    "set_threads": (c_int,),
    "pin_threads": (POINTER(c_int), c_int),
    "pack_panels": (POINTER(WeightStruct), c_void_p, c_void_p),
    "multiply": (POINTER(WeightStruct), c_void_p, c_long, c_void_p, c_int),
    "add_rms_norm_float": _NORM, "add_rms_norm_bf16": _NORM,
    "rope_store_float": (c_void_p, POINTER(StoreStruct)), "rope_store_bf16": (c_void_p, POINTER(StoreStruct)),
    "attend_float": (POINTER(AttentionStruct),), "attend_bf16": (POINTER(AttentionStruct),),
    "choose": (c_void_p, c_long, c_long, POINTER(DrawsStruct), c_void_p),
    "run_layers_float": (c_void_p, c_long, POINTER(PassStruct)),
    "run_layers_bf16": (c_void_p, c_long, POINTER(PassStruct)),
}  # fmt: skip


@cache
def load_library(march: str = "native") -> ctypes.CDLL | None:
    """The library, compiled if need be; None where it cannot be had. march: the compiler's name of what a processor has
    (x86-64-v3: AVX2)."""
    try:
        library = ctypes.CDLL(str(_compiled(_folder(), march)))
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("layers are computed by torch: no native code (%s)", error)
        return None
    for name, arguments in _FUNCTIONS.items():
        getattr(library, name).argtypes = arguments
        getattr(library, name).restype = None
    library.panel_bytes_of.argtypes = (POINTER(WeightStruct),)
    library.panel_bytes_of.restype = c_long
    return library


def _folder() -> Path:
    return Path.home() / ".cache" / "steelyard" / "kernels"


def _compiled(folder: Path, march: str = "native") -> Path:
    """Raises OSError or SubprocessError."""
    features = _cpu_features()
    missing = [name for name in _NEEDED if name not in features]
    if missing:
        raise OSError(f"this processor has no {', '.join(missing)}")
    compiler, version = _compiler()
    flags = (f"-march={march}", *_FLAGS)
    parts = [path.read_bytes() for path in sorted((*_SOURCES.rglob("*.h"), *_SOURCES.glob("*.cpp")))]
    digest = hashlib.blake2b(digest_size=12)
    for part in (*parts, version, repr((flags, _PARTS)).encode(), " ".join(sorted(features)).encode()):
        digest.update(hashlib.blake2b(part).digest())
    path = folder / f"native-{digest.hexdigest()}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        if not path.exists():
            _compile((compiler, *flags), path)
    return path


def _compile(command: Sequence[str], path: Path) -> None:
    _log.info("compiling kernels for this processor, once: some ten seconds")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        parts = [str(Path(folder) / f"{name}.o") for name in _PARTS]
        commands = [
            [*command, level, "-c", "-o", part, str(_SOURCES / name)]
            for part, (name, level) in zip(parts, _PARTS.items(), strict=True)
        ]
        with ThreadPoolExecutor() as pool:
            list(pool.map(_run, commands))
        _run([*command, "-shared", "-o", str(made), *parts])
        made.replace(path)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, timeout=300, check=False)
    if done.returncode:
        raise OSError(f"{command[0]} failed: {done.stderr.decode(errors='replace').strip()[:500]}")


def _compiler() -> tuple[str, bytes]:
    """Its name, and what it says of itself. Raises OSError if there is none."""
    for name in _COMPILERS:
        try:
            told = subprocess.run([name, "--version"], capture_output=True, timeout=60, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        return name, told.stdout
    raise OSError("there is no C++ compiler (c++ or g++)")


def _cpu_features() -> frozenset[str]:
    """Linux's names of them; none elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":")[1] for line in text.splitlines() if line.startswith("flags")), "").split())


def has_avx512() -> bool:
    """Is the code for its vectors chosen here (vectors.h)?"""
    return _cpu_features() >= _AVX512


def has_amx() -> bool:
    """Has this processor tiles of bfloat16, which torch's oneDNN multiplies by?"""
    return "amx_bf16" in _cpu_features()


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
