"""Tap: the outputs of one plain stream, written in the turn of the loop in which they come.

A stream whose client keeps up has nothing to wait for, so no task need wake for a token, and no chain of iterators and
senders hand it on; that was most of what a token cost (`python -m benchmarks.relay`).

1. The answer opens it when its beginning has been sent, if nothing is looked for in its text, it is the only answer,
   and the server can write at once (WRITE_NOW).
2. Each output becomes an event of its own, a time in the ledger and a charge, as it would in the answer's task.
3. What it does not take goes the iterator's way, in order: the end, and all that comes while the client is behind.
   After a fault it takes nothing more; the answer, woken by that output, raises it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from engine.types import TokenOutput
from router.ledger import Ledger
from router.text_stream import TextStream

WRITE_NOW = "steelyard.write_now"  # an ASGI extension; its "line" is a Line of the answer under way


class Line(Protocol):
    """Where an answer's body is written."""

    def is_open(self) -> bool:
        """Has a body of unknown length begun, and can it go on without a wait?"""
        ...

    def write_now(self, body: bytes, /) -> None:
        """A piece of it, not empty, of one that is open."""
        ...


@dataclass(slots=True)
class Tap:
    """`event`: the one with this text. `count` hears of tokens that have left, in seconds since those before; `charge`
    how many were generated, and when."""

    line: Line
    texts: TextStream
    ledger: Ledger
    event: Callable[[str], bytes]
    count: Callable[[float], None]
    charge: Callable[[int, float], None]
    now_s: Callable[[], float]
    fault: Exception | None = field(default=None, init=False)

    def take(self, output: TokenOutput) -> bool:
        """See router.api.Generator.tap."""
        if self.fault is not None or not output.token_ids or not self.line.is_open():
            return False
        try:
            self._send(output)
        except Exception as error:  # it ends this stream, and no other
            self.fault = error
            return False
        return True

    def _send(self, output: TokenOutput) -> None:
        num_tokens, now_s = len(output.token_ids), self.now_s()
        self.charge(num_tokens, now_s)
        if output.stages or output.transfer:
            self.ledger.take(output)
        if text := self.texts.push_plain(output.token_ids):
            self.line.write_now(self.event(text))
        self.count(self.ledger.sent(num_tokens, now_s))
