"""Build a tokenizer from a GGUF file's metadata: byte-level BPE here, SentencePiece in spm_tokenizer.py.

Of byte-level BPE the file holds tokens, their types and merges, but names its pre-tokenizer (how text is cut before
merging) only by `tokenizer.ggml.pre`; `_PRE_TOKENIZERS` holds the ones we know. Other vocabulary models are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from engine.errors import ModelError
from engine.models.config import MetaValue
from engine.models.fields import refused
from engine.models.gguf_vocabulary import TokenType, add_whole_tokens, strings, surround, token_types
from engine.models.spm_tokenizer import build_spm_tokenizer


def build_tokenizer(metadata: Mapping[str, MetaValue]) -> Tokenizer:
    """The tokenizer that `metadata` describes. Raises ModelError that names the key at fault."""
    kind = metadata.get("tokenizer.ggml.model")
    builders = {"gpt2": _build_byte_level, "llama": build_spm_tokenizer}
    if not isinstance(kind, str) or kind not in builders:
        raise refused("tokenizer.ggml.model", kind, tuple(builders))
    return builders[kind](metadata)


def _build_byte_level(metadata: Mapping[str, MetaValue]) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if not isinstance(pre, str) or pre not in _PRE_TOKENIZERS:
        raise refused("tokenizer.ggml.pre", pre, tuple(_PRE_TOKENIZERS))
    tokens = strings(metadata, "tokenizer.ggml.tokens")
    tokenizer = Tokenizer(
        _merges_model(tokens, strings(metadata, "tokenizer.ggml.merges"), ignore_merges=pre == "llama-bpe")
    )
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    add_whole_tokens(
        tokenizer, tokens, token_types(metadata, len(tokens)), special=(TokenType.CONTROL,), normalized=False
    )
    surround(tokenizer, metadata, tokens, add_bos=pre == "llama-bpe")
    return tokenizer


def _merges_model(tokens: list[str], merges: list[str], ignore_merges: bool) -> models.BPE:
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    vocab = {token: index for index, token in enumerate(tokens)}
    try:
        return models.BPE(vocab=vocab, merges=pairs, ignore_merges=ignore_merges)
    except Exception as error:  # the Rust library raises the bare class
        raise ModelError(
            f"tokenizer.ggml.merges do not fit the tokens: {error}", param="tokenizer.ggml.merges"
        ) from error


# --- pre-tokenizers -------------------------------------------------------------------------------------------


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> pre_tokenizers.PreTokenizer:
    """Every digit stands alone, before GPT-2's rule."""
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _split_words(digits: str) -> pre_tokenizers.PreTokenizer:
    """The rule of Llama 3 and Qwen 2, which differ in how many `digits` stay together."""
    rule = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English contractions
        r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # a word, with the character before it
        rf"|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # punctuation, to the end of its line
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(rule), behavior="isolated"), byte_level])


_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "smollm": _smollm,
    "llama-bpe": lambda: _split_words(r"\p{N}{1,3}"),
    "qwen2": lambda: _split_words(r"\p{N}"),
    "gpt-2": _gpt2,
    "default": _gpt2,
}
