"""SentencePiece vocabularies in GGUF: against SentencePiece itself (recorded), the rule written down naively, and
transformers on the real file of Gemma 3."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InvalidRequest, ModelError
from engine.models.detokenizer import IncrementalDetokenizer
from engine.models.gguf_tokenizer import build_tokenizer
from engine.models.gguf_vocabulary import TokenType
from engine.models.tokenizer import Tokenizer
from tests.engine.record_spm import GOLDEN_PATH

GOLDEN = json.loads(GOLDEN_PATH.read_text("utf-8"))["variants"]
SPACE = "▁"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
HEAD = ["<unk>", "<s>", "</s>", *BYTES]
HEAD_TYPES = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]


def metadata_of(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], **overrides: object) -> dict:
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.scores": list(scores),
        "tokenizer.ggml.token_type": [int(one) for one in types],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    } | {f"tokenizer.ggml.{key}": value for key, value in overrides.items()}


def golden_metadata(name: str, **overrides: object) -> dict:
    one = GOLDEN[name]
    metadata = metadata_of(one["tokens"], one["scores"], one["types"], add_space_prefix=one["space_prefix"])
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in overrides.items()}


@pytest.fixture(scope="module", params=GOLDEN)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def backend(name: str) -> tokenizers.Tokenizer:
    return build_tokenizer(golden_metadata(name))


# --- against SentencePiece ------------------------------------------------------------------------------------


def test_ids_are_those_of_sentencepiece_itself(name, backend):
    for text, ids in GOLDEN[name]["texts"].items():
        assert backend.encode(text, add_special_tokens=False).ids == ids, text


def test_text_comes_back(name, backend):
    for text in GOLDEN[name]["texts"]:
        if SPACE not in text:  # which reads as a space
            assert backend.decode(backend.encode(text).ids) == text


# --- against the rule -----------------------------------------------------------------------------------------

CHARACTERS = "ab" + SPACE
pieces = st.text(CHARACTERS, min_size=2, max_size=5)
texts = st.text("ab ☃é", max_size=24)


def joined_naively(text: str, scores: Mapping[str, float], whole: Sequence[str] = ()) -> list[str]:
    """SentencePiece's rule, word for word: user-defined tokens first, the longest at each place; then join the two
    neighbours whose joined piece has the highest score, the leftmost of them, until there are none."""
    symbols: list[tuple[str, bool]] = []
    while text:
        found = max((token for token in whole if text.startswith(token)), key=len, default="")
        symbols.append((found or text[0], bool(found)))
        text = text[len(symbols[-1][0]) :]
    while True:
        pairs = [
            (-scores[left + right], at)
            for at, ((left, left_whole), (right, right_whole)) in enumerate(itertools.pairwise(symbols))
            if not left_whole and not right_whole and left + right in scores
        ]
        if not pairs:
            break
        _, at = min(pairs)
        symbols[at : at + 2] = [(symbols[at][0] + symbols[at + 1][0], False)]
    known = {*scores, *whole}
    return [part for symbol, _ in symbols for part in ([symbol] if symbol in known else as_bytes(symbol))]


def as_bytes(text: str) -> list[str]:
    return [BYTES[byte] for byte in text.encode()]


@settings(deadline=None, max_examples=400)
@given(found=st.lists(pieces, max_size=14, unique=True), text=texts, prefix=st.booleans(), data=st.data())
def test_any_vocabulary_joins_as_the_rule_says(found, text, prefix, data):
    """Scores are a random order: pieces may be preferred to their own parts, or never be reached."""
    normal = [*CHARACTERS, *found]
    order = data.draw(st.permutations(range(len(normal))))
    scores = {piece: -float(rank) for piece, rank in zip(normal, order, strict=True)}
    types = [*HEAD_TYPES, *[TokenType.NORMAL] * len(normal)]
    metadata = metadata_of([*HEAD, *normal], [0.0] * len(HEAD) + list(scores.values()), types, add_space_prefix=prefix)
    expected = joined_naively(f"{SPACE if prefix and text else ''}{text.replace(' ', SPACE)}", scores)
    assert build_tokenizer(metadata).encode(text, add_special_tokens=False).tokens == expected


@settings(deadline=None, max_examples=200)
@given(
    found=st.lists(pieces, max_size=8, unique=True),
    whole=st.lists(st.text(CHARACTERS + "\n", min_size=2, max_size=4), max_size=4, unique=True),
    text=st.text("ab \n", max_size=24),
)
def test_user_defined_tokens_are_matched_whole_and_never_joined(found, whole, text):
    found = [piece for piece in found if piece not in whole]
    scores = {piece: -float(rank) for rank, piece in enumerate([*CHARACTERS, *found])}
    tokens = [*HEAD, *scores, *whole]
    types = [*HEAD_TYPES, *[TokenType.NORMAL] * len(scores), *[TokenType.USER_DEFINED] * len(whole)]
    metadata = metadata_of(tokens, [*[0.0] * len(HEAD), *scores.values(), *[0.0] * len(whole)], types)
    backend = build_tokenizer(metadata | {"tokenizer.ggml.add_space_prefix": False})
    expected = joined_naively(text.replace(" ", SPACE), scores, whole)
    assert backend.encode(text, add_special_tokens=False).tokens == expected


# --- what the file asks for -----------------------------------------------------------------------------------


def test_bos_is_added_and_eos_is_not_unless_the_file_says_otherwise():
    ids = [build_tokenizer(golden_metadata("llama", **change)).encode("a").ids for change in (
        {}, {"add_bos_token": False}, {"add_eos_token": True},
    )]  # fmt: skip
    assert ids[0] == [1, *ids[1]] and ids[2] == [*ids[0], 2]


def test_a_space_goes_before_the_text_unless_the_file_says_otherwise():
    metadata = golden_metadata("llama")
    del metadata["tokenizer.ggml.add_space_prefix"]
    assert build_tokenizer(metadata).encode("the").tokens == ["<s>", "▁the"]
    assert "▁" not in build_tokenizer(golden_metadata("llama", add_space_prefix=False)).encode("the").tokens[1]


def test_control_tokens_in_the_text_become_their_ids_and_byte_tokens_do_not(backend):
    tokens = backend.encode("x</s><0x41>").tokens
    assert "</s>" in tokens and "<0x41>" not in tokens
    assert backend.decode(backend.encode("x</s>y").ids).replace(" ", "") == "xy"


def test_without_byte_tokens_a_run_of_unknown_characters_is_one_unknown_token():
    tokens = ["<unk>", "<s>", "</s>", "a", "▁"]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.NORMAL, TokenType.NORMAL]
    backend = build_tokenizer(metadata_of(tokens, [0.0] * 5, types, add_space_prefix=False))
    assert backend.encode("a☃☃ ☃").tokens == ["<s>", "a", "<unk>", "▁", "<unk>"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"scores": None}, "tokenizer.ggml.scores"),
        ({"scores": [0.0]}, "tokenizer.ggml.scores"),
        ({"scores": ["high"] * 600}, "tokenizer.ggml.scores"),
        ({"tokens": "abc"}, "tokenizer.ggml.tokens"),
        ({"token_type": [1]}, "tokenizer.ggml.token_type"),
        ({"unknown_token_id": 600}, "tokenizer.ggml.unknown_token_id"),
        ({"bos_token_id": -1}, "tokenizer.ggml.bos_token_id"),
        ({"add_eos_token": True, "eos_token_id": None}, "tokenizer.ggml.eos_token_id"),
        ({"add_bos_token": "yes"}, "tokenizer.ggml.add_bos_token"),
        ({"add_space_prefix": True}, "tokenizer.ggml.add_space_prefix"),  # with user-defined spaces
        ({"remove_extra_whitespaces": True}, "tokenizer.ggml.remove_extra_whitespaces"),
        ({"precompiled_charsmap": [1, 2]}, "tokenizer.ggml.precompiled_charsmap"),
        ({"model": "t5"}, "tokenizer.ggml.model"),
        ({"model": "bert"}, "tokenizer.ggml.model"),
    ],
)
def test_a_vocabulary_that_cannot_be_built_names_its_key(change, field):
    with pytest.raises(ModelError, match=field.replace(".", r"\.")) as caught:
        build_tokenizer(golden_metadata("gemma", **change))
    assert caught.value.param == field


def test_half_of_a_surrogate_pair_is_an_invalid_request(backend):
    with pytest.raises(InvalidRequest, match="surrogate"):
        Tokenizer(backend, {}).encode("a\ud800b")


# --- streaming ------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(data=st.data(), skip_special=st.booleans())
def test_pieces_of_random_ids_are_their_text(name, backend, data, skip_special):
    """Any ids but loose bytes, whose runs are words of whole characters here."""
    tokenizer = Tokenizer(backend, {})
    first_byte = GOLDEN[name]["tokens"].index("<0x00>")
    ids_of_one = st.integers(0, 599).filter(lambda one: not first_byte <= one < first_byte + 256).map(lambda one: [one])
    characters = st.characters(codec="utf-8").map(lambda one: [first_byte + byte for byte in one.encode()])
    ids = [one for part in data.draw(st.lists(ids_of_one | characters, max_size=100)) for one in part]
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special)
    sent = [detokenizer.push([one]) for one in ids]
    assert "".join([*sent, detokenizer.flush()]) == tokenizer.decode(ids, skip_special)
    if "\ufffd" not in tokenizer.decode(ids, skip_special):
        assert not any("\ufffd" in piece for piece in sent)


def test_a_leading_space_is_told_from_the_one_that_was_added():
    for name, texts_of in (("llama", ["a", " a", "  a"]), ("gemma", ["a", " a", "  a"])):
        tokenizer = Tokenizer(build_tokenizer(golden_metadata(name)), {})
        for text in texts_of:
            detokenizer = IncrementalDetokenizer(tokenizer)
            ids = tokenizer.encode(text + " long text" * 30)  # beyond the window
            assert "".join([*map(detokenizer.push, ([one] for one in ids)), detokenizer.flush()]).startswith(text)
            assert tokenizer.decode(ids) == text + " long text" * 30
