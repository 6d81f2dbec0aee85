"""Build a byte-level BPE tokenizer from a GGUF file's metadata.

The file holds tokens, their types and merges, but names its pre-tokenizer (how text is cut before merging) only by
`tokenizer.ggml.pre`; `_PRE_TOKENIZERS` holds the ones we know. Another vocabulary model than `gpt2` is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from engine.errors import ModelError
from engine.models.config import MetaValue

_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's token types; both are matched whole in the text


def build_tokenizer(metadata: Mapping[str, MetaValue]) -> Tokenizer:
    """The tokenizer that `metadata` describes. Raises ModelError that names the key at fault."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ModelError(f"tokenizer.ggml.model is {kind!r}; only 'gpt2' is supported", param="tokenizer.ggml.model")
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if not isinstance(pre, str) or pre not in _PRE_TOKENIZERS:
        known = ", ".join(_PRE_TOKENIZERS)
        raise ModelError(f"tokenizer.ggml.pre is {pre!r}; supported: {known}", param="tokenizer.ggml.pre")
    tokens = strings(metadata, "tokenizer.ggml.tokens")
    tokenizer = Tokenizer(
        _merges_model(tokens, strings(metadata, "tokenizer.ggml.merges"), ignore_merges=pre == "llama-bpe")
    )
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    _add_whole_tokens(tokenizer, tokens, metadata.get("tokenizer.ggml.token_type"))
    if metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        _prepend_bos(tokenizer, tokens, metadata.get("tokenizer.ggml.bos_token_id"))
    return tokenizer


def strings(metadata: Mapping[str, MetaValue], key: str) -> list[str]:
    """The list of strings under `key`. Raises ModelError that names the key."""
    value = metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ModelError(f"{key} must be a list of strings", param=key)
    return [str(item) for item in value]


def _merges_model(tokens: list[str], merges: list[str], ignore_merges: bool) -> models.BPE:
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    vocab = {token: index for index, token in enumerate(tokens)}
    try:
        return models.BPE(vocab=vocab, merges=pairs, ignore_merges=ignore_merges)
    except Exception as error:  # the Rust library raises the bare class
        raise ModelError(
            f"tokenizer.ggml.merges do not fit the tokens: {error}", param="tokenizer.ggml.merges"
        ) from error


def _add_whole_tokens(tokenizer: Tokenizer, tokens: list[str], types: MetaValue | None) -> None:
    """Register control tokens as special, and user-defined ones as added, under the ids they already have."""
    if types is None:
        return
    if not isinstance(types, list) or len(types) != len(tokens):
        raise ModelError("tokenizer.ggml.token_type must have one entry per token", param="tokenizer.ggml.token_type")
    of_type = {
        kind: [token for token, found in zip(tokens, types, strict=True) if found == kind]
        for kind in (_CONTROL, _USER_DEFINED)
    }
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in of_type[_CONTROL]])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in of_type[_USER_DEFINED]])


def _prepend_bos(tokenizer: Tokenizer, tokens: list[str], bos_id: MetaValue | None) -> None:
    if not isinstance(bos_id, int) or not 0 <= bos_id < len(tokens):
        raise ModelError(
            f"tokenizer.ggml.bos_token_id is {bos_id!r}, but BOS is to be added", param="tokenizer.ggml.bos_token_id"
        )
    bos = tokens[bos_id]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, bos_id)]
    )


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
