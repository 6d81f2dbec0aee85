"""Pooling: whether a model embeds, and how its hidden states become one vector. As the config says, else the files.

A folder of sentence-transformers says so in `modules.json`, in the `config.json` of its pooling module, and, for
embeddings that may be cut (Matryoshka, Kusupati et al., 2022), in the model's own `config.json` by vLLM's names. A GGUF
file has `{architecture}.pooling_type`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.errors import ModelError
from engine.models.config import ModelConfig
from engine.models.gguf_file import read_gguf
from engine.models.store import ModelFiles, ModelKind, read_json
from engine.types import LAST, MEAN

UNSAID = "its files do not say how its hidden states are pooled"
_GGUF_KINDS = {1: MEAN, 3: LAST}  # llama.cpp's LLAMA_POOLING_TYPE_MEAN and _LAST
_GGUF_NONE = 0
_MODES = {"pooling_mode_lasttoken": LAST, "pooling_mode_mean_tokens": MEAN}
_KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True, slots=True)
class Pooling:
    """`kind`: "last" or "mean", or empty for a model that does not embed, with the reason. `size`: of an embedding.
    `cuts`: the sizes to which it may be cut; `cuts_anywhere`: to any."""

    kind: str = ""
    reason: str = UNSAID
    size: int = 0
    cuts: tuple[int, ...] = ()
    cuts_anywhere: bool = False

    def takes(self, size: int) -> bool:
        return size == self.size or size in self.cuts or (self.cuts_anywhere and size < self.size)


NO_POOLING = Pooling()


def pooling_of(files: ModelFiles, config: ModelConfig, wanted: Literal["auto", "last", "mean"]) -> Pooling:
    """Raises ModelError if a file of these cannot be read."""
    kind, reason = _said_by(files) if wanted == "auto" else (wanted, "")
    size = config.hidden_size
    own = read_json(files.path / "config.json") if files.kind is ModelKind.HF else {}
    listed = own.get("matryoshka_dimensions")
    cuts = tuple(one for one in listed if isinstance(one, int) and 0 < one <= size) if isinstance(listed, list) else ()
    return Pooling(kind, reason, size, cuts, own.get("is_matryoshka") is True and not cuts)


def _said_by(files: ModelFiles) -> tuple[str, str]:
    """The kind, or empty and why there is none."""
    if files.kind is ModelKind.GGUF:
        return _of_gguf(files.path)
    modules = files.path / "modules.json"
    return _of_modules(files.path, _read_modules(modules)) if modules.is_file() else ("", UNSAID)


def _of_gguf(path: Path) -> tuple[str, str]:
    metadata = read_gguf(path).metadata
    number = metadata.get(f"{metadata.get('general.architecture')}.pooling_type", _GGUF_NONE)
    if number == _GGUF_NONE:
        return "", UNSAID
    kind = _GGUF_KINDS.get(number, "") if isinstance(number, int) else ""
    return kind, "" if kind else f"its pooling_type {number} is none of 1 (mean) and 3 (last token)"


def _of_modules(folder: Path, modules: list[Mapping[str, object]]) -> tuple[str, str]:
    """A module that we do not compute, such as a dense layer, would make other embeddings than the model's."""
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    unknown = [kind for kind in kinds if kind not in _KNOWN_MODULES]
    if unknown or kinds.count("Pooling") != 1:
        return "", f"its modules.json has {', '.join(kinds)}; {', '.join(_KNOWN_MODULES)} are supported"
    path = str(modules[kinds.index("Pooling")].get("path", ""))
    if Path(path).name != path:
        raise ModelError(f"{folder / 'modules.json'}: the pooling module's path must be a folder beside it")
    modes = read_json(folder / path / "config.json")
    on = [name for name, value in modes.items() if name.startswith("pooling_mode_") and value is True]
    if len(on) == 1 and on[0] in _MODES:
        return _MODES[on[0]], ""
    return "", f"it pools by {' and '.join(on) or 'no mode'}; one of {', '.join(_MODES)} is supported"


def _read_modules(path: Path) -> list[Mapping[str, object]]:
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ModelError(f"{path} must hold a list of JSON objects")
    return modules
