"""The output of one response: its items as far as they have come, and the events that tell of them.

1. `take` gets the parts of the answer in order: content becomes messages, reasoning and calls items of their own. An
   item is opened by its first part and closed by the first one of another item.
2. `close` ends the last item, as complete or as cut off. An answer without any part is an empty message.
A whole answer comes the same way; its events are for nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from router.logprobs import ScoredToken
from router.parts import CallArguments, CallStart, Content, Part, Reasoning
from router.responses.items import NewNumber, OpenCall, OpenItem, OpenMessage, OpenReasoning, Place
from router.responses.records import AnyEvent, OutputItem, Status
from router.tools.ids import call_id


class Output:
    """`new_number` numbers the events of the stream."""

    def __init__(self, request_id: str, new_number: NewNumber) -> None:
        self.items: list[OutputItem] = []
        self._request_id = request_id
        self._new_number = new_number
        self._open: OpenItem | None = None

    def take(self, parts: Iterable[Part], tokens: tuple[ScoredToken, ...] = ()) -> Iterator[AnyEvent]:
        """`tokens` are those of the first content."""
        for part in parts:
            match part:
                case Content(text):
                    if not isinstance(self._open, OpenMessage):
                        yield from self._begin(OpenMessage(self._place("msg")))
                    yield from self._more(text, tokens)
                    tokens = ()
                case Reasoning(text):
                    if not isinstance(self._open, OpenReasoning):
                        yield from self._begin(OpenReasoning(self._place("rs")))
                    yield from self._more(text)
                case CallStart(index, name):
                    name_of = call_id(self._request_id, 0, index)
                    yield from self._begin(OpenCall(self._place("fc"), name_of, name))
                case CallArguments(_, text):
                    yield from self._more(text)

    def close(self, status: Status) -> Iterator[AnyEvent]:
        if self._open is None:
            yield from self._begin(OpenMessage(self._place("msg")))
        yield from self._end(status)

    def so_far(self) -> list[OutputItem]:
        """What there is when the answer breaks off."""
        return self.items if self._open is None else [*self.items, self._open.item("incomplete")]

    def _more(self, text: str, tokens: tuple[ScoredToken, ...] = ()) -> Iterator[AnyEvent]:
        assert self._open is not None, "arguments follow the start of their call"
        return self._open.more(text, tokens)

    def _begin(self, item: OpenItem) -> Iterator[AnyEvent]:
        yield from self._end("completed")
        self._open = item
        yield from item.opening()

    def _end(self, status: Status) -> Iterator[AnyEvent]:
        if self._open is not None:
            yield from self._open.closing(status)
            self.items.append(self._open.item(status))
            self._open = None

    def _place(self, kind: str) -> Place:
        """Of the next item, once the open one is closed."""
        index = len(self.items) + (self._open is not None)
        return Place(index, f"{kind}_{self._request_id}_{index}", self._new_number)
