"""What both kinds of GGUF tokenizer read from the metadata: tokens, their types, and what stands around a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum

from tokenizers import AddedToken, Tokenizer, processors

from engine.errors import ModelError
from engine.models.config import MetaValue
from engine.models.fields import flag


class TokenType(IntEnum):
    """llama.cpp's, which are SentencePiece's."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def strings(metadata: Mapping[str, MetaValue], key: str) -> list[str]:
    """The list of strings under `key`. Raises ModelError that names the key."""
    value = metadata.get(key)
    if not isinstance(value, list):
        raise ModelError(f"{key} must be a list of strings", param=key)
    found = [item for item in value if isinstance(item, str)]
    if len(found) != len(value):
        raise ModelError(f"{key} must be a list of strings", param=key)
    return found


def numbers(metadata: Mapping[str, MetaValue], key: str, count: int) -> Sequence[float]:
    """The `count` numbers under `key`, one per token. Raises ModelError that names the key."""
    value = metadata.get(key)
    found = [item for item in value if isinstance(item, int | float)] if isinstance(value, list) else []
    if not isinstance(value, list) or not len(found) == len(value) == count:
        raise ModelError(f"{key} must have one entry per token", param=key)
    return found


def token_types(metadata: Mapping[str, MetaValue], num_tokens: int) -> Sequence[float]:
    """One TokenType per token; all are normal where the file has none."""
    key = "tokenizer.ggml.token_type"
    return [TokenType.NORMAL] * num_tokens if metadata.get(key) is None else numbers(metadata, key, num_tokens)


def token_of(metadata: Mapping[str, MetaValue], name: str, tokens: list[str], default: int | None = None) -> str:
    """The token whose id is tokenizer.ggml.`name`_token_id. Raises ModelError that names the key."""
    key = f"tokenizer.ggml.{name}_token_id"
    token_id = metadata.get(key, default)
    if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
        raise ModelError(f"{key} is {token_id!r}, which is none of the {len(tokens)} tokens", param=key)
    return tokens[token_id]


def add_whole_tokens(
    tokenizer: Tokenizer, tokens: list[str], types: Sequence[float], special: tuple[TokenType, ...], normalized: bool
) -> None:
    """Have some tokens matched whole in the text, under the ids they have: those of `special` types as special
    tokens, user-defined ones as plain text. `normalized`: the latter are looked for after the normalizer."""
    found = {
        kind: [token for token, one in zip(tokens, types, strict=True) if one == kind]
        for kind in (*special, TokenType.USER_DEFINED)
    }
    specials = [token for kind in special for token in found[kind]]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    users = found[TokenType.USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, normalized=normalized, special=False) for token in users])


def surround(tokenizer: Tokenizer, metadata: Mapping[str, MetaValue], tokens: list[str], add_bos: bool) -> None:
    """Put BOS before and EOS after a prompt where the file says so; `add_bos` holds where it says nothing."""
    before = [token_of(metadata, "bos", tokens)] if flag(metadata, "tokenizer.ggml.add_bos_token", add_bos) else []
    after = [token_of(metadata, "eos", tokens)] if flag(metadata, "tokenizer.ggml.add_eos_token") else []
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B", *after],
            special_tokens=[(token, tokens.index(token)) for token in {*before, *after}],
        )
