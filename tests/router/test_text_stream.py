"""Tokens to text: the same text however the tokens were bundled, cut before the first stop string."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.types import FinishReason
from router.text_stream import StopScanner, TextStream
from tests.router.fakes import ByteDetokenizer

LETTERS = st.text(alphabet="abé🙂", max_size=30)
STOPS = st.lists(st.text(alphabet="abé🙂", min_size=1, max_size=4), max_size=4)


def cut(text: str, stops: list[str]) -> tuple[str, int | None]:
    """The text before the stop string that is complete first, and where that one ends: the oracle."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], end
    return text, None


def run(text: str, stops: list[str], sizes: list[int]) -> tuple[list[str], FinishReason, int]:
    """Feed the text's bytes in bundles of these sizes. Pieces, finish and number of tokens used."""
    stream = TextStream(ByteDetokenizer(), tuple(stops))
    ids, pieces = tuple(text.encode()), []
    while True:
        size = sizes.pop(0) if sizes else 1
        bundle, ids = ids[:size], ids[size:]
        piece = stream.push(bundle, None if ids else FinishReason.LENGTH)
        pieces.append(piece.text)
        if piece.finish is not None:
            return pieces, piece.finish, stream.num_tokens


@given(text=LETTERS, stops=STOPS, sizes=st.lists(st.integers(0, 9), max_size=20))
def test_text_is_cut_at_the_first_stop_string_however_tokens_are_bundled(
    text: str, stops: list[str], sizes: list[int]
) -> None:
    expected, end = cut(text, stops)
    pieces, finish, num_tokens = run(text, stops, sizes)
    assert "".join(pieces) == expected
    assert finish is (FinishReason.LENGTH if end is None else FinishReason.STOP)
    assert num_tokens == len(text[:end].encode())


@given(text=LETTERS, stop=st.text(alphabet="ab", min_size=1, max_size=4))
def test_one_stop_string_cuts_where_it_first_occurs(text: str, stop: str) -> None:
    assert "".join(run(text, [stop], [])[0]) == text.split(stop)[0]


def test_text_that_may_become_a_stop_string_is_held_back_and_no_more() -> None:
    scanner = StopScanner(("stop", "halt"))
    assert [scanner.push(text) for text in ("a st", "o", "ne s", "h")] == ["a ", "", "stone ", "s"]
    assert scanner.flush() == "h"
    assert not scanner.stopped


def test_half_a_character_at_the_end_is_flushed() -> None:
    stream = TextStream(ByteDetokenizer(), ())
    assert stream.push(tuple("é".encode()[:1]), None).text == ""
    assert stream.push((), FinishReason.LENGTH).text == "�"


def test_a_stop_string_may_come_with_the_flush() -> None:
    stream = TextStream(ByteDetokenizer(), ("�",))
    piece = stream.push((ord("a"), 0xC3), FinishReason.LENGTH)
    assert (piece.text, piece.finish) == ("a", FinishReason.STOP)


def test_a_stop_string_within_the_first_tokens_does_not_end_the_text() -> None:
    stream = TextStream(ByteDetokenizer(), ("ab",), min_tokens=4)
    pieces = [stream.push((byte,), None) for byte in b"abxxab"]
    assert "".join(piece.text for piece in pieces) == "abxx"
    assert [piece.finish for piece in pieces] == [None] * 5 + [FinishReason.STOP]
    assert stream.num_tokens == 6
