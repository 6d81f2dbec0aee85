"""IncrementalDetokenizer: its pieces are the whole text, no piece ends in half a character, and it stays linear."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.models.detokenizer import Pieces
from engine.models.loader import load_config
from engine.models.store import ModelFiles
from engine.models.tokenizer import IncrementalDetokenizer, Tokenizer, load_tokenizer

MIXED = "naïve e\u0301 a\u0308\u0323 你好世界 こんにちは 👩‍👩‍👧‍👦 🇨🇭 👍🏽 𝔘𝔫𝔦 \ufffd \ufffd\ufffd end"


@pytest.fixture(scope="module")
def tokenizer(smollm2_files: ModelFiles) -> Tokenizer:
    return load_tokenizer(smollm2_files, load_config(smollm2_files))


@pytest.fixture(scope="module")
def byte_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids of the tokens that are no character by themselves: the vocabulary's loose bytes."""
    return [i for i in range(tokenizer.vocab_size) if tokenizer.token_text(i) == "\ufffd"]


def stream(tokenizer, chunks: Iterable[Sequence[int]], skip_special: bool = True) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special)
    return [*(detokenizer.push(chunk) for chunk in chunks), detokenizer.flush()]


def chunked(ids: list[int], sizes: list[int]) -> Iterable[list[int]]:
    start = 0
    for size in sizes:
        yield ids[start : start + size]
        start += size
    yield ids[start:]


ids_of_any_kind = st.lists(st.integers(0, 49160) | st.integers(0, 300), max_size=120)
sizes_of_chunks = st.lists(st.integers(0, 5), max_size=60)


@settings(deadline=None, max_examples=200)
@given(ids=ids_of_any_kind, sizes=sizes_of_chunks, skip_special=st.booleans())
def test_pieces_of_random_ids_are_their_text(tokenizer, ids, sizes, skip_special):
    assert "".join(stream(tokenizer, chunked(ids, sizes), skip_special)) == tokenizer.decode(ids, skip_special)


@settings(deadline=None, max_examples=200)
@given(ids=ids_of_any_kind, sizes=sizes_of_chunks, skip_special=st.booleans(), shown=st.frozensets(st.integers(0, 16)))
def test_pieces_without_decoding_are_the_same(tokenizer, ids, sizes, skip_special, shown):
    """Piece by piece, over random ids and with whole text before and after them."""
    assert tokenizer.is_bytewise
    ids = [*tokenizer.encode(MIXED), *ids, *tokenizer.encode(MIXED)]
    known = IncrementalDetokenizer(tokenizer, skip_special, shown, Pieces(tokenizer, skip_special, shown))
    plain = IncrementalDetokenizer(tokenizer, skip_special, shown)
    for chunk in chunked(ids, sizes):
        assert known.push(chunk) == plain.push(chunk)
    assert known.flush() == plain.flush()


@settings(deadline=None, max_examples=200)
@given(picks=st.lists(st.integers(0, 10**6), max_size=150), specials=st.lists(st.integers(0, 16), max_size=20))
def test_pieces_of_loose_bytes_are_their_text(tokenizer, byte_ids, picks, specials):
    ids = [byte_ids[pick % len(byte_ids)] for pick in picks] + specials + byte_ids[:1]
    assert "".join(stream(tokenizer, ([i] for i in ids))) == tokenizer.decode(ids)


@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=80) | st.text("e\u0301\u0308 你👩\u200d👧🇨🇭", max_size=80))
def test_no_piece_of_valid_text_shows_half_a_character(tokenizer, text):
    ids = tokenizer.encode(text, add_special=False)
    pieces = stream(tokenizer, ([i] for i in ids), skip_special=False)
    decoded = tokenizer.decode(ids, skip_special=False)  # not always `text`: the vocabulary lacks some bytes
    assert "".join(pieces) == decoded
    if "\ufffd" not in decoded:
        assert all("\ufffd" not in piece for piece in pieces)


def test_each_character_leaves_with_the_token_that_completes_it(tokenizer):
    ids = tokenizer.encode(MIXED, add_special=False)
    detokenizer = IncrementalDetokenizer(tokenizer)
    sent = ""
    for index, token in enumerate(ids):
        sent += detokenizer.push([token])
        assert sent == tokenizer.decode(ids[: index + 1]).rstrip("\ufffd")
    assert sent + detokenizer.flush() == MIXED


def test_an_unfinished_character_leaves_with_flush(tokenizer):
    ids = tokenizer.encode("x 𝔘", add_special=False)[:-1]
    pieces = stream(tokenizer, ([i] for i in ids))
    assert "".join(pieces[:-1]) == "x "
    assert pieces[-1].strip("\ufffd") == ""
    assert "".join(pieces) == tokenizer.decode(ids)


def test_pushing_nothing_gives_nothing(tokenizer):
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert (detokenizer.push([]), detokenizer.flush()) == ("", "")
    assert detokenizer.push([0, 2]) == ""


class CountingDecoder:
    """Counts how many ids are decoded in all."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.num_decoded = 0

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        self.num_decoded += len(ids)
        return self.tokenizer.decode(ids, skip_special)

    def visible_ids(
        self, ids: Iterable[int], skip_special: bool = True, shown: frozenset[int] = frozenset()
    ) -> list[int]:
        return self.tokenizer.visible_ids(ids, skip_special, shown)


def test_the_work_per_token_does_not_grow(tokenizer, byte_ids):
    for ids in (tokenizer.encode(MIXED * 100), byte_ids[:1] * 4000, byte_ids * 40):
        decoder = CountingDecoder(tokenizer)
        assert "".join(stream(decoder, ([i] for i in ids))) == tokenizer.decode(ids)
        assert decoder.num_decoded < 50 * len(ids)


# --- a decoder with byte fallback, as in Llama 2 --------------------------------------------------------------


@pytest.fixture(scope="module")
def fallback() -> Tokenizer:
    """A SentencePiece-like vocabulary: words that begin with U+2581, and one token per byte for everything else."""
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)} | {"▁a": 257, "b": 258, "▁": 259}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(backend, {})


@settings(deadline=None, max_examples=150)
@given(
    words=st.lists(
        st.sampled_from([[257], [258], [259, 257]]) | st.characters(codec="utf-8", min_codepoint=128), max_size=80
    )
)
def test_byte_fallback_streams_whole_characters(fallback, words):
    ids = [i for word in words for i in (word if isinstance(word, list) else [byte + 1 for byte in word.encode()])]
    pieces = stream(fallback, ([i] for i in ids))
    assert "".join(pieces) == fallback.decode(ids)
    if "\ufffd" not in fallback.decode(ids):
        assert all("\ufffd" not in piece for piece in pieces)
