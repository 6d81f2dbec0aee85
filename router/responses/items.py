"""Items of a response's output while they are being said: what has come of each, and the events that tell of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from router.logprobs import ScoredToken
from router.responses.records import (
    AnyEvent,
    ArgumentsDelta,
    ArgumentsDone,
    ItemEvent,
    OfItem,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputPart,
    OutputReasoning,
    OutputReasoningText,
    OutputText,
    PartEvent,
    ReasoningDelta,
    ReasoningDone,
    Status,
    TextDelta,
    TextDone,
    output_logprobs,
)

NewNumber = Callable[[], int]
E = TypeVar("E", bound=OfItem)


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the output an item stands. `new_number` numbers the events of the stream."""

    index: int
    item_id: str
    new_number: NewNumber

    def event(self, kind: type[E], **fields: object) -> E:
        common = {"sequence_number": self.new_number(), "item_id": self.item_id, "output_index": self.index}
        return kind.model_validate(common | fields)

    def added(self, item: OutputItem) -> ItemEvent:
        return self._item("response.output_item.added", item)

    def done(self, item: OutputItem) -> ItemEvent:
        return self._item("response.output_item.done", item)

    def part_added(self, part: OutputPart) -> PartEvent:
        return self.event(PartEvent, type="response.content_part.added", part=part)

    def part_done(self, part: OutputPart) -> PartEvent:
        return self.event(PartEvent, type="response.content_part.done", part=part)

    def _item(self, kind: str, item: OutputItem) -> ItemEvent:
        common = {"sequence_number": self.new_number(), "output_index": self.index}
        return ItemEvent.model_validate(common | {"type": kind, "item": item})


class OpenItem(Protocol):
    def opening(self) -> Iterator[AnyEvent]: ...

    def more(self, text: str, tokens: tuple[ScoredToken, ...], /) -> Iterator[AnyEvent]: ...

    def closing(self, status: Status) -> Iterator[AnyEvent]:
        """The last event has the item."""
        ...

    def item(self, status: Status) -> OutputItem:
        """As far as it has come."""
        ...


@dataclass(slots=True)
class OpenMessage:
    place: Place
    texts: list[str] = field(default_factory=list)
    tokens: list[ScoredToken] = field(default_factory=list)

    def opening(self) -> Iterator[AnyEvent]:
        begun = OutputMessage(id=self.place.item_id, status="in_progress", content=[])
        yield self.place.added(begun)
        yield self.place.part_added(self._part())

    def more(self, text: str, tokens: tuple[ScoredToken, ...]) -> Iterator[AnyEvent]:
        self.texts.append(text)
        self.tokens += tokens
        yield self.place.event(TextDelta, delta=text, logprobs=output_logprobs(tokens))

    def closing(self, status: Status) -> Iterator[AnyEvent]:
        part = self._part()
        yield self.place.event(TextDone, text=part.text, logprobs=part.logprobs)
        yield self.place.part_done(part)
        yield self.place.done(self.item(status))

    def item(self, status: Status) -> OutputMessage:
        return OutputMessage(id=self.place.item_id, status=status, content=[self._part()])

    def _part(self) -> OutputText:
        return OutputText(text="".join(self.texts), annotations=[], logprobs=output_logprobs(self.tokens))


@dataclass(slots=True)
class OpenReasoning:
    place: Place
    texts: list[str] = field(default_factory=list)

    def opening(self) -> Iterator[AnyEvent]:
        begun = OutputReasoning(id=self.place.item_id, summary=[], content=[], status="in_progress")
        yield self.place.added(begun)
        yield self.place.part_added(self._part())

    def more(self, text: str, _tokens: tuple[ScoredToken, ...]) -> Iterator[AnyEvent]:
        self.texts.append(text)
        yield self.place.event(ReasoningDelta, delta=text)

    def closing(self, status: Status) -> Iterator[AnyEvent]:
        yield self.place.event(ReasoningDone, text=self._part().text)
        yield self.place.part_done(self._part())
        yield self.place.done(self.item(status))

    def item(self, status: Status) -> OutputReasoning:
        return OutputReasoning(id=self.place.item_id, summary=[], content=[self._part()], status=status)

    def _part(self) -> OutputReasoningText:
        return OutputReasoningText(text="".join(self.texts))


@dataclass(slots=True)
class OpenCall:
    place: Place
    call_id: str
    name: str
    texts: list[str] = field(default_factory=list)

    def opening(self) -> Iterator[AnyEvent]:
        yield self.place.added(self.item("in_progress"))

    def more(self, text: str, _tokens: tuple[ScoredToken, ...]) -> Iterator[AnyEvent]:
        self.texts.append(text)
        yield self.place.event(ArgumentsDelta, delta=text)

    def closing(self, status: Status) -> Iterator[AnyEvent]:
        yield self.place.event(ArgumentsDone, name=self.name, arguments="".join(self.texts))
        yield self.place.done(self.item(status))

    def item(self, status: Status) -> OutputCall:
        arguments = "".join(self.texts)
        return OutputCall(
            id=self.place.item_id, call_id=self.call_id, name=self.name, arguments=arguments, status=status
        )
