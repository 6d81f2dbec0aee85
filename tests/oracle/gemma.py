"""Gemma 3 270M as an oracle's model: its files, and twenty prompts of 5 to 620 tokens, several beyond its window.

It is a base model, so that every prompt is a text to go on with: this project's own, and runs of its licence, each cut
to the length wanted.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from engine.models.decoder import Weights
from engine.models.loader import load_config
from engine.models.store import ModelFiles, resolve
from engine.models.tokenizer import Tokenizer, load_tokenizer
from engine.models.weights import load_weights
from tests.oracle.prompts import OraclePrompt, own_texts

MODEL = "gemma-3-270m"
GOLDEN_PATH = Path(__file__).with_name("golden_gemma.json")
NUM_NEW = 32
WINDOW = 512  # tokens, of five layers in six
LENGTHS = (5, 7, 9, 12, 15, 19, 24, 30, 38, 48, 61, 77, 97, 150, 230, 350, 505, 530, 575, 620)  # tokens, BOS included


@cache
def files() -> ModelFiles:
    return resolve(MODEL)


@cache
def weights() -> Weights:
    return load_weights(files(), load_config(files()), torch.float32)


@cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(files(), load_config(files()))


@cache
def prompts() -> tuple[OraclePrompt, ...]:
    """Of each length the beginning of the first text that is long enough and not used yet."""
    texts = [(kind, tuple(tokenizer().encode(text))) for kind, text in own_texts()]
    chosen: list[OraclePrompt] = []
    for length in LENGTHS:
        kind, ids = next((kind, ids) for kind, ids in texts if len(ids) >= length)
        texts.remove((kind, ids))
        chosen.append(OraclePrompt(kind, False, ids[:length]))
    return tuple(chosen)
