"""Build the tokenizer of a SentencePiece BPE vocabulary (Llama 2, Mistral, Gemma) from a GGUF file's metadata.

SentencePiece has no merges: it joins, again and again, the two neighbours that together are the piece of the highest
score, the leftmost such pair first. `tokenizers` wants merges, in the order of their preference:

1. `rank_merges` takes every split of a piece into two pieces, those of the highest score first.
2. The order of one piece's splits does not matter, since only one of them ever happens: joins inside a stretch of
   text that becomes one piece are the ones that would be made if it stood alone.
3. Spaces become U+2581, with one more before the text if the file asks for it; characters without a piece become their
   UTF-8 bytes. Control and user-defined tokens are matched whole, before anything is joined.

Two different pieces of equal score, which training does not make, are joined lower id first instead of leftmost first.
Unused pieces take no part in joining.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer, decoders, models, normalizers

from engine.errors import ModelError
from engine.models.config import MetaValue
from engine.models.fields import flag
from engine.models.gguf_vocabulary import (
    TokenType,
    add_whole_tokens,
    numbers,
    strings,
    surround,
    token_of,
    token_types,
)

_SPACE = "\u2581"  # stands for a space in every piece
_SPECIAL = (TokenType.UNKNOWN, TokenType.CONTROL)


def build_spm_tokenizer(metadata: Mapping[str, MetaValue]) -> Tokenizer:
    """The tokenizer that `metadata` describes. Raises ModelError that names the key at fault."""
    _refuse_unsupported(metadata)
    tokens = strings(metadata, "tokenizer.ggml.tokens")
    types = token_types(metadata, len(tokens))
    merges = rank_merges(tokens, numbers(metadata, "tokenizer.ggml.scores", len(tokens)), types)
    unknown = token_of(metadata, "unknown", tokens, default=0)
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, byte_fallback=True, fuse_unk=True))
    space_first = flag(metadata, "tokenizer.ggml.add_space_prefix", True)
    tokenizer.normalizer = _normalizer(space_first)
    tokenizer.decoder = _decoder(space_first)
    if space_first:
        _refuse_spaces_in_user_tokens(tokens, types)
    # A user-defined token may hold U+2581, so it is looked for after the normalizer; but that would put U+2581 before
    # the token, too, where it puts one before a text.
    add_whole_tokens(tokenizer, tokens, types, _SPECIAL, normalized=not space_first)
    surround(tokenizer, metadata, tokens, add_bos=True)
    return tokenizer


def rank_merges(tokens: Sequence[str], scores: Sequence[float], types: Sequence[float]) -> list[tuple[str, str]]:
    """Every pair of pieces that is a piece, the preferred ones first."""
    normal = [index for index, kind in enumerate(types) if kind == TokenType.NORMAL]
    normal.sort(key=lambda index: -scores[index])  # stable, so equal ones stay in the order of their ids
    ordered = [tokens[index] for index in normal]
    pieces = set(ordered)
    return [
        (token[:cut], token[cut:])
        for token in ordered
        for cut in range(1, len(token))
        if token[:cut] in pieces and token[cut:] in pieces
    ]


def _refuse_unsupported(metadata: Mapping[str, MetaValue]) -> None:
    for key in ("tokenizer.ggml.remove_extra_whitespaces", "tokenizer.ggml.precompiled_charsmap"):
        if metadata.get(key):
            raise ModelError(f"{key} is not supported: it changes the text before it is cut", param=key)


def _refuse_spaces_in_user_tokens(tokens: Sequence[str], types: Sequence[float]) -> None:
    key = "tokenizer.ggml.add_space_prefix"
    for token, kind in zip(tokens, types, strict=True):
        if kind == TokenType.USER_DEFINED and _SPACE in token:
            raise ModelError(
                f"{key} is not supported beside the user-defined token {token!r}, which holds a space", param=key
            )


def _normalizer(space_first: bool) -> normalizers.Normalizer:
    spaces = normalizers.Replace(" ", _SPACE)
    return normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if space_first else spaces


def _decoder(space_first: bool) -> decoders.Decoder:
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if space_first else parts)
