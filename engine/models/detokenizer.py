"""IncrementalDetokenizer: the text of a token stream, piece by piece, without ever showing half a character.

A token may end inside a UTF-8 character; decoded alone such a tail reads as U+FFFD. So trailing U+FFFD are held back
until the next tokens complete them or show that they never will. Only a window of recent tokens is decoded again:

1. `push` appends each token to the window, decodes it, and returns what is new up to the held-back tail.
2. When the window is long, its older part is dropped, at a place where the rest decodes to the same text as before.
3. `flush` returns the held-back tail.
All pieces together equal the decoding of all ids at once; the time is linear in their number. Decoders with byte
fallback read a run of byte tokens all or nothing, so for them this holds while such runs are valid UTF-8.

Where decoding only puts bytes together (byte-level vocabularies), a token of whole characters adds its own text while
no character is unfinished: `Pieces` keeps these texts, and nothing is decoded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

_REPLACEMENT = "\ufffd"
_MAX_WINDOW = 12  # tokens; beyond, the window is cut once no character is unfinished
_MAX_NOISE = 64  # tokens; beyond, what is held back is no character but loose bytes, and the window is cut anyway
_KEPT = 4  # tokens left by a cut; more than the 3 that can hold an unfinished character
_MAX_UNFINISHED = 3  # bytes of a UTF-8 character that lacks its end, hence U+FFFD that may still change


class Decoder(Protocol):
    """What the detokenizer needs of a Tokenizer."""

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...

    def visible_ids(
        self, ids: Iterable[int], skip_special: bool = True, shown: frozenset[int] = frozenset()
    ) -> list[int]: ...


class Pieces(dict[int, str | None]):
    """By token id: its text, if it is whole characters, else None. For a decoder that puts the bytes of tokens together
    and does nothing else. Each is decoded once; many streams may share it."""

    def __init__(self, decoder: Decoder, skip_special: bool = True, shown: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self._alone = IncrementalDetokenizer(decoder, skip_special, shown)

    def __missing__(self, token: int) -> str | None:
        text = self._alone.text_of([token])
        self[token] = piece = None if _REPLACEMENT in text else text
        return piece


class IncrementalDetokenizer:
    """Streams one sequence's text; of special tokens, with `skip_special`, only those in `shown`."""

    def __init__(
        self, decoder: Decoder, skip_special: bool = True, shown: frozenset[int] = frozenset(),
        pieces: Pieces | None = None,
    ) -> None:  # fmt: skip
        """`pieces`: of the same decoder, for the same tokens."""
        self._decoder = decoder
        self._skip_special = skip_special
        self._shown = shown
        self._pieces = pieces
        self._window: list[int] = []
        self._num_sent = 0  # characters of the window's text already returned

    def push(self, ids: Sequence[int]) -> str:
        """The text that `ids` complete; empty while a character is unfinished."""
        return self._push_one(ids[0]) if len(ids) == 1 else "".join(map(self._push_one, ids))

    def _push_one(self, token: int) -> str:
        if self._pieces is not None and not self._window and (piece := self._pieces[token]) is not None:
            return piece
        return "".join(map(self._push_visible, self._visible([token])))

    def _push_visible(self, token: int) -> str:
        self._window.append(token)
        text = self._decode(self._window)
        num_held = len(text) - len(text.rstrip(_REPLACEMENT))
        is_noise = len(self._window) > _MAX_NOISE
        if is_noise:
            num_held = min(num_held, _MAX_UNFINISHED)
        piece = self._take(text, len(text) - num_held)
        if self._pieces is not None and num_held == 0:
            self._window, self._num_sent = [], 0
        elif is_noise or (num_held == 0 and len(self._window) > _MAX_WINDOW):
            self._cut(text)
        return piece

    def text_of(self, ids: Iterable[int]) -> str:
        """Of these tokens alone."""
        return self._decode(self._visible(ids))

    def flush(self) -> str:
        """What was held back, at the end of the sequence."""
        text = self._decode(self._window)
        return self._take(text, len(text))

    def _take(self, text: str, end: int) -> str:
        start, self._num_sent = self._num_sent, max(self._num_sent, end)
        return text[start : self._num_sent]

    def _cut(self, text: str) -> None:
        """Drop old tokens where the rest reads as before: not inside a character."""
        first = len(self._window) - _KEPT
        for start in range(first, first - _MAX_UNFINISHED - 1, -1):
            rest = self._decode(self._window[start:])
            num_dropped = len(text) - len(rest)
            if text.endswith(rest) and 0 <= num_dropped <= self._num_sent:
                self._window = self._window[start:]
                self._num_sent -= num_dropped
                return

    def _visible(self, ids: Iterable[int]) -> list[int]:
        return self._decoder.visible_ids(ids, self._skip_special, self._shown)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._decoder.decode(ids, skip_special=self._skip_special and not self._shown)
