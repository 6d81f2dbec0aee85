"""Model files for the engine's tests: the default model, and tiny random ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
import torch

from engine.models.store import ModelFiles, resolve

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

_SIGMA = 0.15  # of random parameters, norms and biases too: ones and zeros would hide faults


@pytest.fixture(scope="session")
def smollm2_files() -> ModelFiles:
    """The default model, pulled once into the user's cache."""
    return resolve("smollm2-135m-instruct")


@pytest.fixture
def tiny_llama(tmp_path: Path) -> Callable[..., tuple[LlamaForCausalLM, Path]]:
    """Make a random Llama and save it: (model, folder). Keyword arguments override its LlamaConfig."""
    from transformers import LlamaConfig, LlamaForCausalLM  # seconds to import, which most tests do not need

    def make(
        max_shard_size: str = "1GB", dtype: torch.dtype = torch.float32, **overrides: Any
    ) -> tuple[LlamaForCausalLM, Path]:
        shape: dict[str, Any] = {
            "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2,
        }  # fmt: skip
        model = LlamaForCausalLM(LlamaConfig(**(shape | overrides)))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, _SIGMA, generator=generator)
        torch.nn.Module.to(model, dtype=dtype)
        folder = tmp_path / "tiny-llama"
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return model, folder

    return make


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Callable[..., Path]:
    """Write a small random GGUF Llama whose matrices have the quantisation `kind`; overrides replace metadata."""

    def make(kind: str = "F32", extra: dict[str, np.ndarray] | None = None, **overrides: object) -> Path:
        path = tmp_path / "tiny.gguf"
        writer = gguf.GGUFWriter(path, str(overrides.pop("architecture", "llama")))
        numbers: dict[str, object] = {
            "llama.embedding_length": 64, "llama.block_count": 2, "llama.attention.head_count": 4,
            "llama.attention.head_count_kv": 2, "llama.feed_forward_length": 96, "llama.context_length": 128,
            "llama.vocab_size": 128, "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 5e5,
            "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        }  # fmt: skip
        for key, value in (numbers | overrides).items():
            if isinstance(value, str):
                writer.add_string(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            else:
                writer.add_uint32(key, int(str(value)))
        for name, values in (_gguf_tensors() | (extra or {})).items():
            wanted = gguf.GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
            if wanted in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
                writer.add_tensor(name, values.astype(np.float16 if wanted.name == "F16" else np.float32))
            else:
                writer.add_tensor(name, gguf.quants.quantize(values, wanted), raw_dtype=wanted)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return make


def _gguf_tensors() -> dict[str, np.ndarray]:
    """Random tensors of the shape that `tiny_gguf` describes; the head is tied."""
    random = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (128, 64), "output_norm.weight": (64,)}
    layer = {
        "attn_norm": (64,), "ffn_norm": (64,), "attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64),
        "attn_output": (64, 64), "ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96),
    }  # fmt: skip
    for index in range(2):
        shapes |= {f"blk.{index}.{name}.weight": shape for name, shape in layer.items()}
    return {name: random.normal(0, _SIGMA, shape).astype(np.float32) for name, shape in shapes.items()}
