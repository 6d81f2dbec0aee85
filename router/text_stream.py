"""Turns the token ids of one generation into text, and ends it at a stop string.

A generation stops as soon as any stop string is complete, however tokens and chunks were cut: of all
occurrences the one that ends first counts, and of several that end there the longest. The text ends before
it. Text that could still become a stop string is held back, so nothing is sent that has to be taken back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.types import FinishReason
from router.logprobs import ScoredToken
from router.parts import Part
from router.reasoning import ReasoningCounter


class Detokenizer(Protocol):
    """Ids to text as they come; bytes of an unfinished character wait inside."""

    def push(self, ids: Sequence[int], /) -> str: ...

    def flush(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """What one output gave: text to send (may be empty), whether it is the last, its tokens where their logprobs were
    asked for, and the parts that the text turned out to be, where one looks for these."""

    text: str
    finish: FinishReason | None
    tokens: tuple[ScoredToken, ...] = ()
    parts: tuple[Part, ...] = ()


class StopScanner:
    """Cuts a stream of text before the first stop string. `stopped` is True once it was met."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stopped = False
        self._stops = stops
        self._held = ""  # the longest end of the text so far that begins a stop string

    def push(self, text: str) -> str:
        """The text that is now certain to belong to the output."""
        text = self._held + text
        met = min(((start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0), default=None)
        if met is not None:
            self.stopped, self._held = True, ""
            return text[: met[1]]
        certain = len(text) - self._num_doubtful(text)
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """At the end, what was held back belongs to the output."""
        held, self._held = self._held, ""
        return held

    def _num_doubtful(self, text: str) -> int:
        longest = min(max((len(stop) - 1 for stop in self._stops), default=0), len(text))
        sizes = range(longest, 0, -1)
        return next((size for size in sizes if any(stop.startswith(text[-size:]) for stop in self._stops)), 0)


class TextStream:
    """One generation's text. `num_tokens` counts what the output needed: none after the end of a stop string."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: tuple[str, ...],
        min_tokens: int = 0,
        counter: ReasoningCounter | None = None,
    ) -> None:
        """The text of the first `min_tokens` tokens is not searched for stop strings. `counter` hears each token that
        counts."""
        self.num_tokens = 0
        self._min_tokens = min_tokens
        self._detokenizer = detokenizer
        self._scanner = StopScanner(stops)
        self._has_stops = bool(stops)
        self._counter = counter

    @property
    def num_reasoning(self) -> int:
        """Of `num_tokens`, those of reasoning."""
        return self._counter.num_tokens if self._counter is not None else 0

    @property
    def is_plain(self) -> bool:
        """Nothing is looked for in it: tokens are only text."""
        return not self._has_stops and self._counter is None

    def push_plain(self, token_ids: tuple[int, ...]) -> str:
        """Of one that is plain, what is not its end."""
        self.num_tokens += len(token_ids)
        return self._detokenizer.push(token_ids)

    def push(self, token_ids: tuple[int, ...], finish: FinishReason | None) -> Piece:
        if finish is None and self.is_plain:
            return Piece(self.push_plain(token_ids), None)
        text = ""
        for ids in self._portions(token_ids):
            self.num_tokens += len(ids)
            new = self._detokenizer.push(ids)
            if self._counter is not None:
                self._counter.push(new)
            text += new if self._has_stops and self.num_tokens < self._min_tokens else self._scanner.push(new)
            if self._scanner.stopped:
                return Piece(text, FinishReason.STOP)
        if finish is None:
            return Piece(text, None)
        text += self._scanner.push(self._detokenizer.flush())
        if self._scanner.stopped:
            return Piece(text, FinishReason.STOP)
        return Piece(text + self._scanner.flush(), finish)

    def _portions(self, token_ids: tuple[int, ...]) -> Iterable[list[int]]:
        """Only with stop strings and reasoning does it matter which token completed the text."""
        if self._has_stops or self._counter is not None:
            return [[token_id] for token_id in token_ids]
        return [list(token_ids)] if token_ids else []
