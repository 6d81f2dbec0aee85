"""A Matching: how far one answer has come in its grammar. A function of the grammar and of the tokens generated, so it
is made anew from these wherever the answer goes on, and nothing of it crosses a wire."""

from __future__ import annotations

from collections.abc import Sequence as TokenIds

from llguidance import LLMatcher


class Matching:
    __slots__ = ("_num_consumed", "matcher")

    def __init__(self, matcher: LLMatcher) -> None:
        """`matcher` is at the grammar's beginning, and belongs to this answer alone."""
        self.matcher = matcher
        self._num_consumed = 0

    def follow(self, generated: TokenIds[int]) -> None:
        """Go to the state after these tokens. They are those of the last call with some more, or some fewer, at their
        end. What does not keep to the grammar leaves the matcher in its error state."""
        if len(generated) < self._num_consumed:
            self.matcher.rollback(self._num_consumed - len(generated))
        else:
            self.matcher.consume_tokens(list(generated[self._num_consumed :]))
        self._num_consumed = len(generated)
