"""What the Responses API answers: the response and its items; and the events of its stream, which are numbered.

What the API leaves out while it is not known (`usage`) is left out of the JSON; all else is there, null if need be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, Field, JsonValue

from router.logprobs import ScoredToken, TopLogprob, chat_logprobs

Status = Literal["in_progress", "completed", "incomplete"]


# --- items of the output -------------------------------------------------------------------------------------


class OutputTopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]  # empty for a part of a character


class OutputLogprob(OutputTopLogprob):
    top_logprobs: list[OutputTopLogprob]


class OutputText(BaseModel):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[JsonValue]
    logprobs: list[OutputLogprob]


class OutputMessage(BaseModel):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Status
    content: list[OutputText]


class OutputReasoningText(BaseModel):
    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class OutputReasoning(BaseModel):
    id: str
    type: Literal["reasoning"] = "reasoning"
    summary: list[JsonValue]
    content: list[OutputReasoningText]
    status: Status


class OutputCall(BaseModel):
    id: str
    type: Literal["function_call"] = "function_call"
    call_id: str
    name: str
    arguments: str
    status: Status


OutputItem = Annotated[OutputMessage | OutputReasoning | OutputCall, Field(discriminator="type")]
OutputPart = Annotated[OutputText | OutputReasoningText, Field(discriminator="type")]


def output_logprobs(tokens: Sequence[ScoredToken]) -> list[OutputLogprob]:
    scored = chat_logprobs(tokens)
    return [
        OutputLogprob(**_likely(one).model_dump(), top_logprobs=[*map(_likely, one.top_logprobs)])
        for one in (scored.content if scored else ())
    ]


def _likely(one: TopLogprob) -> OutputTopLogprob:
    return OutputTopLogprob(token=one.token, logprob=one.logprob, bytes=one.bytes or [])


# --- the response --------------------------------------------------------------------------------------------


class InputTokensDetails(BaseModel):
    cached_tokens: int
    cache_write_tokens: int  # on the client's own request, which cannot be made here: 0


class OutputTokensDetails(BaseModel):
    reasoning_tokens: int


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(BaseModel):
    reason: Literal["max_output_tokens"]


class ResponseFailure(BaseModel):
    code: Literal["server_error", "rate_limit_exceeded"]
    message: str


class ResponseReply(BaseModel):
    """The response object. What was asked for comes back; what was left open, with what it was taken for."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseFailure | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, JsonValue]
    store: bool
    temperature: float
    text: dict[str, JsonValue]
    tool_choice: JsonValue
    tools: list[dict[str, JsonValue]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    metadata: dict[str, str]


class DeletedResponse(BaseModel):
    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


# --- events of a stream --------------------------------------------------------------------------------------


class Event(BaseModel):
    """Its `type` names it; the numbers of a stream's events are 0, 1, 2, ..."""

    sequence_number: int


class ResponseEvent(Event):
    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    response: ResponseReply


class ItemEvent(Event):
    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputItem


class OfItem(Event):
    """Of what comes of one item."""

    item_id: str
    output_index: int


class PartEvent(OfItem):
    type: Literal["response.content_part.added", "response.content_part.done"]
    content_index: Literal[0] = 0
    part: OutputPart


class TextDelta(OfItem):
    type: Literal["response.output_text.delta"] = "response.output_text.delta"
    content_index: Literal[0] = 0
    delta: str
    logprobs: list[OutputLogprob]


class TextDone(OfItem):
    type: Literal["response.output_text.done"] = "response.output_text.done"
    content_index: Literal[0] = 0
    text: str
    logprobs: list[OutputLogprob]


class ReasoningDelta(OfItem):
    type: Literal["response.reasoning_text.delta"] = "response.reasoning_text.delta"
    content_index: Literal[0] = 0
    delta: str


class ReasoningDone(OfItem):
    type: Literal["response.reasoning_text.done"] = "response.reasoning_text.done"
    content_index: Literal[0] = 0
    text: str


class ArgumentsDelta(OfItem):
    type: Literal["response.function_call_arguments.delta"] = "response.function_call_arguments.delta"
    delta: str


class ArgumentsDone(OfItem):
    type: Literal["response.function_call_arguments.done"] = "response.function_call_arguments.done"
    name: str
    arguments: str


class ErrorEvent(Event):
    type: Literal["error"] = "error"
    code: str | None
    message: str
    param: str | None


AnyEvent = (
    ResponseEvent | ItemEvent | PartEvent | TextDelta | TextDone | ReasoningDelta | ReasoningDone
    | ArgumentsDelta | ArgumentsDone | ErrorEvent
)  # fmt: skip
RESPONSE_EVENTS: tuple[type[Event], ...] = get_args(AnyEvent)
