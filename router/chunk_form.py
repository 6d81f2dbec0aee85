"""The JSON of a stream's chunks, made from parts that are serialised once per generation.

A chunk of a stream differs from the one before in a few characters. `ChunkForm` keeps what stays the same, and writes
the text between; the bytes are those that pydantic gives for the same chunk. Whole answers, and chunks with logprobs or
a part other than text, are the dialects' own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict

from router.ledger import Timeline

STREAM_END = b"data: [DONE]\n\n"
_PLACE = "\ue000"  # where the text goes; from a private area, it is in no other field


class ChunkForm:
    """`sample(index, text)` gives one event of a choice, with that text in it and nothing else that changes."""

    def __init__(self, sample: Callable[[int, str], bytes]) -> None:
        self._sample = sample
        self._events: dict[int, Callable[[str], bytes]] = {}  # by choice

    def event(self, index: int) -> Callable[[str], bytes]:
        """Of this choice: from a text to its event."""
        return self._events.get(index) or self._events.setdefault(index, self._new_event(index))

    def _new_event(self, index: int) -> Callable[[str], bytes]:
        before, after = self._sample(index, _PLACE).split(_PLACE.encode())
        before, after = before.removesuffix(b'"'), after.removeprefix(b'"')  # the text comes with its quotes

        def event(text: str) -> bytes:
            return before + _encode_string(text).encode() + after

        return event


_encode_string = json.encoder.encode_basestring  # as pydantic writes it: only what JSON needs is escaped


def timeline_field(timeline: Timeline) -> bytes:
    """A field of a JSON object, by name."""
    return b'"timeline":' + json.dumps(asdict(timeline), separators=(",", ":")).encode()


def with_field(body: bytes, field: bytes) -> bytes:
    """A JSON object, which has fields, with one more."""
    assert body.endswith(b"}")
    return body[:-1] + b"," + field + b"}"


def before_end(last: bytes, event: bytes) -> bytes:
    """The last bytes of a stream with one more event, before [DONE] where that comes."""
    if last.endswith(STREAM_END):
        return last.removesuffix(STREAM_END) + event + STREAM_END
    return last + event
