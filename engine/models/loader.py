"""Read a model's configuration from its files, without torch."""

from __future__ import annotations

import struct
from pathlib import Path

from engine.errors import ModelError
from engine.models.config import ModelConfig
from engine.models.config_gguf import config_from_gguf
from engine.models.config_hf import config_from_hf
from engine.models.gguf_file import GgufFile, read_gguf
from engine.models.store import ModelFiles, ModelKind, read_json

_ROPE_FACTORS = "rope_freqs.weight"
_F32 = 0  # GGMLQuantizationType.F32


def load_config(files: ModelFiles) -> ModelConfig:
    """The shape of the model in `files`. Raises ModelError that names the file, and in `param` the field."""
    try:
        if files.kind is ModelKind.GGUF:
            return _gguf_config(read_gguf(files.path))
        generation = files.path / "generation_config.json"
        return config_from_hf(
            read_json(files.path / "config.json"), read_json(generation) if generation.exists() else None
        )
    except ModelError as error:
        if str(files.path) in error.message:
            raise
        raise ModelError(f"{files.path}: {error.message}", param=error.param) from error


def _gguf_config(gguf: GgufFile) -> ModelConfig:
    return config_from_gguf(gguf.metadata, gguf.tensors.keys(), _rope_factors(gguf))


def _rope_factors(gguf: GgufFile) -> list[float] | None:
    """Divisors of the rotary frequencies, [head_dim / 2], which llama.cpp stores as a tensor; None without them."""
    tensor = gguf.tensors.get(_ROPE_FACTORS)
    if tensor is None:
        return None
    if tensor.type_id != _F32:
        raise ModelError(f"{_ROPE_FACTORS} must be F32, not type {tensor.type_id}", param=_ROPE_FACTORS)
    data = _read_range(gguf.path, tensor.start, tensor.size_bytes)
    return [value for (value,) in struct.iter_unpack("<f", data)]


def _read_range(path: Path, start: int, size_bytes: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size_bytes)
