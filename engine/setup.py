"""What an engine will be, known before any tensor exists: its model's shape, its cache layout, its cohort."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from engine.config import EngineConfig, ModelSource, Quantization
from engine.engine import EngineSpec
from engine.errors import ModelError
from engine.layer_groups import LayerGroups
from engine.models.config import ModelConfig
from engine.models.loader import load_config
from engine.models.store import ModelFiles, resolve
from engine.planes import CacheLayout, attention_layout, layout_hash
from engine.scheduler import SchedulerLimits
from engine.shares import check_split

_FINGERPRINT_BYTES = 65536  # read from either end of each weight file


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """All that a process needs to build the same engine as another. Crosses a local pipe, never a network."""

    files: ModelFiles
    model: ModelConfig
    spec: EngineSpec
    layout: CacheLayout
    cohort: str
    config: EngineConfig
    dtype: str
    batch_invariant: bool
    quantization: Quantization = "none"
    num_ranks: int = 1  # of the worker; `layout` and `model` are of all of them together


def plan_engine(
    source: ModelSource, config: EngineConfig, hash_key: bytes, num_ranks: int = 1, layer_group_bytes: int = 0
) -> EngineSetup:
    """Find the model's files and work out everything but tensors. Raises ModelError.

    `layer_group_bytes`: kv_transfer's, of a pool on the CPU. A GPU's kernels store a layer after they were launched."""
    files = resolve(source.name, Path(source.cache_dir).expanduser() if source.cache_dir else None)
    model = load_config(files)
    if source.max_context is not None:
        if source.max_context > model.max_context:
            raise ModelError(
                f"max_context {source.max_context} exceeds the model's own {model.max_context}",
                param="model.max_context",
            )
        model = replace(model, max_context=source.max_context)
    width = min(model.intermediate_size, model.moe.intermediate_size if model.moe else model.intermediate_size)
    check_split(num_ranks, model.num_heads, model.num_kv_heads, width)
    layout = attention_layout(
        model.num_layers,
        model.num_kv_heads,
        model.head_dim,
        config.block_size,
        source.dtype,
        model.layer_windows,
    )
    limits = SchedulerLimits(
        config.block_size, config.max_batch_tokens, config.max_batch_seqs, config.prefill_chunk, config.prefix_cache,
        groups=layout.groups, max_overtaken=config.max_overtaken,
    )  # fmt: skip
    spec = EngineSpec(
        limits, config.num_blocks, model.max_context, model.vocab_size, frozenset(model.eos_token_ids), hash_key,
        LayerGroups.of(layout, layer_group_bytes if config.device == "cpu" else 0),
    )  # fmt: skip
    name = files.name if source.quantization == "none" else f"{files.name} in {source.quantization}"
    cohort = layout_hash(layout, name, fingerprint(files))
    invariant = source.dtype == "float32" if config.batch_invariant is None else config.batch_invariant
    return EngineSetup(
        files, model, spec, layout, cohort, config, source.dtype, invariant, source.quantization, num_ranks
    )


def fingerprint(files: ModelFiles) -> str:
    """Names a model's weights by the sizes and both ends of their files: equal weights, equal fingerprint."""
    digest = hashlib.blake2b(digest_size=16)
    for path in files.weight_files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            digest.update(file.read(_FINGERPRINT_BYTES))
            file.seek(max(0, size - _FINGERPRINT_BYTES))
            digest.update(file.read(_FINGERPRINT_BYTES))
    return digest.hexdigest()
