"""One generation in the words of the Responses API: whole, or as the numbered events of a stream.

1. `opening` says what was asked for; 2. `text` adds to the output; 3. `closing` notes how it ended; 4. `ending`, or
`whole` for all of it, makes the last record, which `keep` gets. A fault in between ends the stream by `failure`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import count
from typing import Literal

from pydantic import JsonValue

from engine.errors import SteelyardError
from engine.types import FinishReason
from router.logprobs import ScoredToken
from router.parts import CallArguments, CallStart, Content, Part, Reasoning, Spoken
from router.replies import Usage, WholeChoice
from router.responses.body import ResponseBody
from router.responses.output import Output
from router.responses.records import (
    AnyEvent,
    ErrorEvent,
    IncompleteDetails,
    InputTokensDetails,
    OutputTokensDetails,
    ResponseEvent,
    ResponseFailure,
    ResponseReply,
    ResponseUsage,
)

Ending = Literal["completed", "incomplete", "failed"]


class ResponseReplies:
    """Implements router.replies.Replies, for one answer. `keep` hears of the finished response, with its JSON."""

    def __init__(
        self,
        asked: ResponseBody,
        request_id: str,
        wall_clock: Callable[[], float],
        keep: Callable[[ResponseReply, bytes], None],
    ) -> None:
        numbers = count()
        self._new_number = lambda: next(numbers)
        self._output = Output(request_id, self._new_number)
        self._begun = begun(asked, f"resp_{request_id}", int(wall_clock()))
        self._wall_clock = wall_clock
        self._keep = keep
        self._finish = FinishReason.STOP

    def whole(self, choices: Sequence[WholeChoice], usage: Usage) -> bytes:
        (choice,) = choices
        for _ in self._output.take(_parts_of(choice), tuple(choice.tokens)):
            pass
        for _ in self._close(choice.finish):
            pass
        return self._kept(usage)[1]

    def opening(self, num_choices: int, usage: Usage | None = None) -> Iterator[bytes]:
        assert num_choices == 1
        for kind in ("response.created", "response.in_progress"):
            yield self._tell(kind, self._begun)

    def text(self, index: int, text: str, tokens: Sequence[ScoredToken] = (), usage: Usage | None = None) -> bytes:
        return _written(self._output.take((Content(text),), tuple(tokens)))

    def plain(self, index: int) -> Callable[[str], bytes]:
        return partial(self.text, index)

    def part(self, index: int, part: Part, tokens: Sequence[ScoredToken] = (), usage: Usage | None = None) -> bytes:
        return _written(self._output.take((part,), tuple(tokens)))

    def closing(self, index: int, finish: FinishReason, has_calls: bool = False, usage: Usage | None = None) -> bytes:
        return _written(self._close(finish))

    def ending(self, usage: Usage) -> bytes:
        reply, _ = self._kept(usage)
        return self._tell(f"response.{reply.status}", reply)

    def failure(self, error: SteelyardError) -> bytes:
        said = ErrorEvent(sequence_number=self._new_number(), code=error.code, message=error.message, param=error.param)
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        failed = ResponseFailure(code=code, message=error.message)
        reply = self._begun.model_copy(update={"status": "failed", "error": failed, "output": self._output.so_far()})
        return _written((said,)) + self._tell("response.failed", reply)

    def _close(self, finish: FinishReason) -> Iterator[AnyEvent]:
        self._finish = finish
        return self._output.close("incomplete" if finish is FinishReason.LENGTH else "completed")

    def _kept(self, usage: Usage) -> tuple[ResponseReply, bytes]:
        is_cut = self._finish is FinishReason.LENGTH
        reply = self._begun.model_copy(
            update={
                "status": "incomplete" if is_cut else "completed",
                "incomplete_details": IncompleteDetails(reason="max_output_tokens") if is_cut else None,
                "completed_at": None if is_cut else int(self._wall_clock()),
                "output": self._output.items,
                "usage": response_usage(usage),
            }
        )
        data = reply.model_dump_json().encode()
        self._keep(reply, data)
        return reply, data

    def note(self, field: bytes) -> bytes:
        """An event of ours, after all of the API's: clients pass over types that they do not know."""
        kind = "steelyard.timeline"
        return b'event: %s\ndata: {"type":"%s","sequence_number":%d,%s}\n\n' % (
            kind.encode(), kind.encode(), self._new_number(), field,
        )  # fmt: skip

    def _tell(self, kind: str, reply: ResponseReply) -> bytes:
        event = ResponseEvent.model_validate({"type": kind, "sequence_number": self._new_number(), "response": reply})
        return _written((event,))


def _parts_of(choice: WholeChoice) -> Iterator[Part]:
    """In the order in which models say them."""
    spoken = choice.spoken or Spoken(choice.text, "", ())
    if spoken.reasoning:
        yield Reasoning(spoken.reasoning)
    if spoken.content or choice.spoken is None:
        yield Content(spoken.content)
    for index, call in enumerate(spoken.calls):
        yield CallStart(index, call.name)
        yield CallArguments(index, call.arguments)


def begun(asked: ResponseBody, response_id: str, created: int) -> ResponseReply:
    """The response before anything of it is there."""
    text: dict[str, JsonValue] = {"format": {"type": "text"}}
    if asked.text is not None:
        text |= asked.text.model_dump(by_alias=True, exclude_none=True)
    return ResponseReply(
        id=response_id,
        created_at=created,
        status="in_progress",
        instructions=asked.instructions,
        max_output_tokens=asked.max_output_tokens,
        model=asked.model,
        output=[],
        parallel_tool_calls=asked.parallel_tool_calls is not False,
        previous_response_id=asked.previous_response_id,
        reasoning={"effort": asked.reasoning.effort if asked.reasoning else None, "summary": None},
        store=asked.is_kept,
        temperature=1.0 if asked.temperature is None else asked.temperature,
        text=text,
        tool_choice=asked.chosen_tool,
        tools=[one.as_shown for one in asked.tools or ()],
        top_logprobs=asked.top_logprobs or 0,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        metadata=asked.metadata or {},
    )


def response_usage(usage: Usage) -> ResponseUsage:
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(
            cached_tokens=usage.prompt_tokens_details.cached_tokens, cache_write_tokens=0
        ),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=usage.completion_tokens_details.reasoning_tokens),
        total_tokens=usage.total_tokens,
    )


def _written(events: Iterable[AnyEvent]) -> bytes:
    return b"".join(map(_event, events))


def _event(event: AnyEvent) -> bytes:
    """`usage` is left out while it is not known."""
    is_early = isinstance(event, ResponseEvent) and event.response.usage is None
    data = event.model_dump_json(exclude={"response": {"usage"}} if is_early else None)
    return f"event: {event.type}\ndata: {data}\n\n".encode()
