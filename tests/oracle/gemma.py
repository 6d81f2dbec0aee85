"""Gemma 3 270M as an oracle's model: its files, and twenty prompts of 5 to 620 tokens, several beyond its window.

It is a base model, so that every prompt is a text to go on with, cut to the length wanted: prompts of Spec-Bench,
HumanEval and GSM8K where they are at hand, else this project's own texts and runs of its licence.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import torch

from engine.models.decoder import Weights
from engine.models.loader import load_config
from engine.models.store import ModelFiles, resolve
from engine.models.tokenizer import Tokenizer, load_tokenizer
from engine.models.weights import load_weights
from tests.oracle.prompts import OraclePrompt, data_texts, has_data, own_texts

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


def prompts() -> tuple[OraclePrompt, ...]:
    return _choose(_mixed(data_texts())) if has_data() else own_prompts()


def own_prompts() -> tuple[OraclePrompt, ...]:
    """What a checkout without the data sets gets."""
    return _choose(own_texts())


def _mixed(texts: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """In an order that is the same everywhere and has all kinds early."""
    return tuple(sorted(texts, key=lambda text: hashlib.sha256(text[1].encode()).digest()))


@cache
def _choose(texts: tuple[tuple[str, str], ...]) -> tuple[OraclePrompt, ...]:
    """Of each length the beginning of the first text that is long enough and not used yet."""
    left = list(texts)
    chosen: list[OraclePrompt] = []
    for length in sorted(LENGTHS, reverse=True):  # long texts are rare
        kind, text, ids = next(found for found in map(_encoded, left) if len(found[2]) >= length)
        left.remove((kind, text))
        chosen.append(OraclePrompt(kind, False, ids[:length]))
    return tuple(reversed(chosen))


@cache
def _encoded(text: tuple[str, str]) -> tuple[str, str, tuple[int, ...]]:
    return (*text, tuple(tokenizer().encode(text[1])))
