"""load_weights against transformers: what it saved, and its own reading of GGUF."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaForCausalLM
from transformers.integrations.gguf.dequant import dequantize
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from engine.errors import ModelError
from engine.models.gguf_file import read_gguf
from engine.models.loader import load_config
from engine.models.store import ModelFiles, resolve
from engine.models.weights import load_weights
from engine.models.weights_gguf import canonical_name


def load(files: ModelFiles, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return load_weights(files, load_config(files), dtype)


def gguf_by_transformers(files: ModelFiles) -> dict[str, torch.Tensor]:
    config: Any = AutoConfig.from_pretrained(files.path.parent, gguf_file=files.path.name)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return load_gguf_checkpoint(str(files.path), return_tensors=True, model_to_load=model)["tensors"]


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
        assert ours[name].is_contiguous(), name


@pytest.mark.parametrize("max_shard_size", ["1GB", "8KB"])
@pytest.mark.parametrize(
    "overrides",
    [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True, "head_dim": 16}],
    ids=["plain", "tied", "biases"],
)
def test_saved_weights_load_bit_for_bit(tiny_llama, max_shard_size, overrides):
    model, folder = tiny_llama(max_shard_size, **overrides)
    files = resolve(str(folder))
    assert (len(files.weight_files) > 1) == (max_shard_size == "8KB")
    theirs = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        theirs.pop("lm_head.weight")
    assert_equal(load(files), theirs)


@pytest.mark.parametrize(("saved", "wanted"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_weights_come_in_the_type_that_was_asked_for(tiny_llama, saved, wanted):
    model, folder = tiny_llama(dtype=saved)
    assert_equal(load(resolve(str(folder)), wanted), {k: v.to(wanted) for k, v in model.state_dict().items()})


@pytest.mark.slow
def test_the_default_model_loads_as_transformers_loads_it(smollm2_files):
    assert_equal(load(smollm2_files), gguf_by_transformers(smollm2_files))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_every_quantisation_loads_as_transformers_loads_it(tiny_gguf, kind):
    files = resolve(str(tiny_gguf(kind)))
    assert_equal(load(files), {name: tensor.float() for name, tensor in gguf_by_transformers(files).items()})


def test_dequantised_values_equal_another_implementation(smollm2_files):
    """transformers' torch dequantiser shares no code with the gguf package, which both readers above use."""
    ours = load(smollm2_files)
    data = np.memmap(smollm2_files.path, dtype=np.uint8, mode="r")
    tensors = read_gguf(smollm2_files.path).tensors
    for name in ("token_embd.weight", "blk.0.attn_v.weight", "blk.17.ffn_down.weight", "blk.29.attn_output.weight"):
        tensor = tensors[name]
        raw = torch.from_numpy(data[tensor.start : tensor.start + tensor.size_bytes].copy())
        canonical = canonical_name(name, load_config(smollm2_files))
        assert canonical is not None
        assert torch.equal(ours[canonical], dequantize(raw, tensor.type_id).reshape(tensor.shape)), name


# --- faults ---------------------------------------------------------------------------------------------------


def rewrite(folder, change) -> None:
    """Change the tensors of a model in one file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def test_a_wrong_shape_names_tensor_file_and_both_shapes(tiny_llama):
    _, folder = tiny_llama()
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(3, 5)}))
    with pytest.raises(ModelError, match=rf"model\.safetensors: tensor {name} has shape \[3, 5\], .* \[48, 32\]"):
        load(resolve(str(folder)))


def test_a_missing_tensor_is_named(tiny_llama):
    _, folder = tiny_llama()
    rewrite(folder, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ModelError, match=r"tiny-llama: tensor model\.norm\.weight \[32\] is missing"):
        load(resolve(str(folder)))


def test_an_unknown_tensor_is_named(tiny_llama):
    _, folder = tiny_llama()
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}))
    with pytest.raises(ModelError, match=r"no place for tensor model\.layers\.0\.self_attn\.q_norm\.weight \[8\]"):
        load(resolve(str(folder)))


def test_leftovers_that_change_nothing_are_ignored(tiny_llama):
    model, folder = tiny_llama(tie_word_embeddings=True)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "lm_head.weight": torch.ones(96, 32)}
    rewrite(folder, lambda tensors: tensors.update(extra))
    weights = load(resolve(str(folder)))
    assert torch.equal(weights["model.embed_tokens.weight"], model.model.embed_tokens.weight)
    assert not extra.keys() & weights.keys()


def test_a_corrupt_header_after_resolving_is_named(tiny_llama):
    _, folder = tiny_llama()
    files = resolve(str(folder))
    config = load_config(files)
    path = files.weight_files[0]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ModelError, match=r"cannot read .*model\.safetensors"):
        load_weights(files, config, torch.float32)


def test_a_gguf_tensor_of_the_wrong_shape_is_named(tiny_gguf):
    path = tiny_gguf(extra={"blk.0.attn_q.weight": np.zeros((48, 64), dtype=np.float32)})
    with pytest.raises(
        ModelError, match=r"tiny\.gguf: tensor model\.layers\.0\.self_attn\.q_proj\.weight has shape \[48, 64\]"
    ):
        load(resolve(str(path)))


def test_an_unknown_gguf_tensor_is_named(tiny_gguf):
    path = tiny_gguf(extra={"blk.0.attn_sinks.weight": np.zeros(16, dtype=np.float32)})
    with pytest.raises(ModelError, match=r"unknown tensor blk\.0\.attn_sinks\.weight"):
        load(resolve(str(path)))


def test_a_config_for_another_depth_misses_a_tensor(tiny_llama):
    _, folder = tiny_llama()
    files = resolve(str(folder))
    with pytest.raises(ModelError, match=r"model\.layers\.2\.input_layernorm\.weight"):
        load_weights(files, replace(load_config(files), num_layers=3), torch.float32)


def test_an_index_that_lists_an_absent_tensor_shows_at_load(tiny_llama):
    _, folder = tiny_llama("8KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = content["weight_map"]["model.norm.weight"]
    tensors = load_file(folder / shard)
    tensors.pop("model.norm.weight")
    save_file(tensors or {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, folder / shard)
    with pytest.raises(ModelError, match=r"model\.norm\.weight \[32\] is missing"):
        load(resolve(str(folder)))
