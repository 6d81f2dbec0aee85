"""The model store: from what a user calls a model to files that are there and whole.

A reference is, in this order:
1. a name of the catalogue, pulled once into the cache (pull.py);
2. a path: a `.gguf` file, or a folder with config.json and safetensors, or with one `.gguf` file;
3. a hub name, `org/name`, which huggingface_hub fetches and caches.
Pickled checkpoints are refused: loading one runs whatever code is in it. Every file's length is checked against its
own header (or the catalogue) before it is handed out, so that a broken download fails here and not in a worker.
It knows no torch and no model shapes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from engine.errors import ModelError
from engine.models.catalogue import CATALOGUE
from engine.models.gguf_file import read_gguf
from engine.models.pull import find_pulled, pull, verify_digests

ReportProgress = Callable[[str, int, int], None]
"""Called with the stage's name, and how much of how much is done (bytes)."""

_PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer*"]
_INDEX = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # the limit that the safetensors format sets


class ModelKind(StrEnum):
    HF = "hf"  # a folder: config.json, tokenizer.json, safetensors
    GGUF = "gguf"  # one file that holds everything


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on disk. `path` is the folder (HF) or the file (GGUF); `weight_files` hold its tensors."""

    name: str
    kind: ModelKind
    path: Path
    weight_files: tuple[Path, ...]


def resolve(
    reference: str,
    cache_dir: Path | None = None,
    progress: ReportProgress | None = None,
    allow_download: bool = True,
    verify: bool = False,
) -> ModelFiles:
    """Find the model's files, pulling them where the reference needs it.

    `verify` also compares the digests of a catalogue model (about 0.1 s per 100 MB). Safe for several processes at a
    time. Raises ModelError that names the file or the reference at fault."""
    cache_dir = cache_dir or default_cache_dir()
    report = progress or _report_nothing
    if reference in CATALOGUE:
        return _resolve_catalogue(reference, cache_dir, report, allow_download, verify)
    path = Path(reference).expanduser()
    if path.suffix in _PICKLED:
        raise ModelError(
            f"{path} is a pickled checkpoint; pickled checkpoints are never loaded, use safetensors or GGUF"
        )
    if path.suffix == ".gguf":
        return _gguf_files(path.stem, path)
    if path.is_dir():
        return _resolve_folder(path.resolve().name, path)
    if _HUB_NAME.fullmatch(reference):
        return _resolve_hub(reference, cache_dir, report, allow_download)
    raise ModelError(
        f"no model {reference!r}: it is no catalogue name ({', '.join(CATALOGUE)}), no folder, no .gguf file "
        "and no hub name (org/name)"
    )


def default_cache_dir() -> Path:
    """Where pulled models live when nothing else is configured: $XDG_CACHE_HOME or ~/.cache, /steelyard/models."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "steelyard" / "models"


def read_json(path: Path) -> dict[str, object]:
    """The JSON object in `path`. Raises ModelError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ModelError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return value


def _report_nothing(_stage: str, _done: int, _total: int) -> None:
    return None


# --- the catalogue --------------------------------------------------------------------------------------------


def _resolve_catalogue(
    name: str, cache_dir: Path, progress: ReportProgress, allow_download: bool, verify: bool
) -> ModelFiles:
    model, folder = CATALOGUE[name], cache_dir / name
    paths = find_pulled(model, folder)
    if paths is None and not allow_download:
        raise ModelError(f"{name} is not in {cache_dir}, and downloads are off")
    if paths is None:
        paths = pull(model, folder, progress)
    elif verify:
        verify_digests(model, folder, progress)
    return _gguf_files(name, paths[0])


# --- paths ----------------------------------------------------------------------------------------------------


def _gguf_files(name: str, path: Path) -> ModelFiles:
    if not path.is_file():
        raise ModelError(f"no such file: {path}")
    parts = read_gguf(path).metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise ModelError(
            f"{path}: split.count is {parts}; a GGUF model in several files is not supported", param="split.count"
        )
    return ModelFiles(name, ModelKind.GGUF, path, (path,))


def _resolve_folder(name: str, folder: Path) -> ModelFiles:
    found = sorted(folder.iterdir())
    ggufs = [path for path in found if path.suffix == ".gguf"]
    if (folder / "config.json").is_file():
        weights = _safetensors_in(folder, found)
        for path in weights:
            check_safetensors(path)
        return ModelFiles(name, ModelKind.HF, folder, weights)
    if len(ggufs) == 1:
        return _gguf_files(name, ggufs[0])
    _refuse_pickled(folder, found)
    raise ModelError(f"{folder} holds no model: it needs config.json with safetensors, or exactly one .gguf file")


def _safetensors_in(folder: Path, found: list[Path]) -> tuple[Path, ...]:
    """The folder's weight files: those of the index, else the one safetensors file there is."""
    if (folder / _INDEX).is_file():
        return _indexed_shards(folder)
    weights = [path for path in found if path.suffix == ".safetensors"]
    if len(weights) == 1:
        return tuple(weights)
    if not weights:
        _refuse_pickled(folder, found)
        raise ModelError(f"{folder} holds no safetensors file")
    raise ModelError(f"{folder} holds {len(weights)} safetensors files but no {_INDEX}")


def _indexed_shards(folder: Path) -> tuple[Path, ...]:
    weight_map = read_json(folder / _INDEX).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ModelError(f"{folder / _INDEX}: weight_map must map tensor names to files of the same folder")
    shards = tuple(folder / name for name in sorted(names))
    for shard in shards:
        if not shard.is_file():
            raise ModelError(f"{shard} is missing; {folder / _INDEX} lists it")
    return shards


def _refuse_pickled(folder: Path, found: list[Path]) -> None:
    pickled = [path.name for path in found if path.suffix in _PICKLED]
    if pickled:
        raise ModelError(
            f"{folder} holds only pickled checkpoints ({', '.join(pickled)}); pickled checkpoints are never loaded, "
            "convert to safetensors"
        )


def check_safetensors(path: Path) -> None:
    """Compare the file's length with what its header promises. Raises ModelError that names the file."""
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if header_bytes > min(size_bytes - 8, _MAX_HEADER_BYTES):
                raise ModelError(
                    f"{path} is truncated or no safetensors file: its header would be {header_bytes} bytes long"
                )
            header = json.loads(file.read(header_bytes))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is corrupt: its header cannot be read ({error})") from error
    expected_bytes = 8 + header_bytes + max(ends, default=0)
    if size_bytes != expected_bytes:
        raise ModelError(f"{path} is truncated or corrupt: {size_bytes} bytes, its header says {expected_bytes}")


# --- the hub --------------------------------------------------------------------------------------------------


def _resolve_hub(reference: str, cache_dir: Path, progress: ReportProgress, allow_download: bool) -> ModelFiles:
    from huggingface_hub import snapshot_download

    progress(f"fetching {reference}", 0, 0)
    try:
        folder = snapshot_download(
            reference, allow_patterns=_HUB_FILES, cache_dir=cache_dir / "hub", local_files_only=not allow_download
        )
    except Exception as error:  # the client lets the errors of its HTTP library through, whichever that is
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"cannot fetch {reference} from the model hub: {reason}") from error
    return _resolve_folder(reference, Path(folder))
