"""A model's folder small enough to be made and loaded in a moment: random weights, and a token for each byte."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers

from tests.engine.tiny import random_weights, tiny_config

NAME = "tiny-bytes"
MAX_CONTEXT = 4096
VOCAB = 257  # the bytes and the end of sequence
EOS = 256
CHAT_TEMPLATE = "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}[assistant]"


def write_tiny_model(folder: Path, template: str = CHAT_TEMPLATE, marks: Sequence[str] = ()) -> Path:
    """A two-layer Llama in Hugging Face's format. Its weights are the same each time. `marks`: further special tokens,
    whose ids come after EOS."""
    folder.mkdir()
    config = tiny_config(vocab_size=VOCAB + len(marks), max_context=MAX_CONTEXT, eos_token_ids=(EOS,))
    save_file(random_weights(config, seed=7), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_hf_config(config.vocab_size)))
    tokenizer_config = {
        "eos_token": "<|end|>",
        "chat_template": template,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    byte_tokenizer(marks).save(str(folder / "tokenizer.json"))
    return folder


def _hf_config(vocab_size: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab_size, "hidden_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "intermediate_size": 48, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "max_position_embeddings": MAX_CONTEXT,
        "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "hidden_act": "silu",
        "eos_token_id": EOS, "torch_dtype": "float32",
    }  # fmt: skip


def byte_tokenizer(marks: Sequence[str] = ()) -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|end|>", *marks])
    return made
