"""What POST /v1/chat/completions answers, whole and in chunks.

A message has its content (null where there are only calls or reasoning), the reasoning under both names that clients
know, and the calls: as `tool_calls`, or as `function_call` where the body used the older `functions`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel

from engine.errors import SteelyardError
from engine.types import FinishReason
from router.chunk_form import ChunkForm
from router.errors import error_event
from router.logprobs import ChatLogprobs, PromptLogprobs, ScoredToken, chat_logprobs
from router.parts import CallArguments, CallStart, Content, Part, Reasoning, Spoken
from router.replies import STREAM_END, Usage, WholeChoice, as_event, as_json, plain_finish, with_fields, with_note
from router.tools.ids import call_id, short_id

ChatFinish = Literal["stop", "length", "tool_calls", "function_call"]


class CalledFunction(BaseModel):
    name: str
    arguments: str


class ReplyCall(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ReplyMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str = ""
    reasoning: str = ""
    tool_calls: list[ReplyCall] = []
    function_call: CalledFunction | None = None


class ChatChoice(BaseModel):
    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinish


class ChatReply(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None


class DeltaFunction(BaseModel):
    name: str = ""
    arguments: str = ""


class DeltaCall(BaseModel):
    index: int
    id: str = ""
    type: Literal["function"] = "function"
    function: DeltaFunction


class Delta(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None = ""
    reasoning_content: str = ""
    reasoning: str = ""
    tool_calls: list[DeltaCall] = []
    function_call: DeltaFunction | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinish | None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


@dataclass(slots=True)
class ChatReplies:
    """With `has_usage` every chunk has a usage field: null, until the last, unless each is to have it. `is_legacy`:
    calls are in the older words. `has_short_ids`: the model's template takes no others."""

    request_id: str
    model: str
    created: int
    fingerprint: str
    has_usage: bool = False
    is_legacy: bool = False
    has_short_ids: bool = False
    _form: ChunkForm = field(init=False)

    def __post_init__(self) -> None:
        self._form = ChunkForm(self._text)

    def whole(self, choices: Tokens[WholeChoice], usage: Usage) -> bytes:
        reply = ChatReply(
            id=f"chatcmpl-{self.request_id}",
            object="chat.completion",
            created=self.created,
            model=self.model,
            system_fingerprint=self.fingerprint,
            choices=[self._choice(*one) for one in enumerate(choices)],
            usage=usage,
        )
        prompt = choices[0].prompt_logprobs
        return as_json(reply if prompt is None else with_fields(reply, prompt_logprobs=prompt))

    def opening(self, num_choices: int, usage: Usage | None = None) -> Iterator[bytes]:
        for index in range(num_choices):
            yield self._chunk(index, Delta(role="assistant", content=""), None, usage=usage)

    def text(self, index: int, text: str, tokens: Tokens[ScoredToken] = (), usage: Usage | None = None) -> bytes:
        changes = tokens or usage is not None
        return self._text(index, text, tokens, usage) if changes else self._form.event(index)(text)

    def plain(self, index: int) -> Callable[[str], bytes]:
        return self._form.event(index)

    def _text(self, index: int, text: str, tokens: Tokens[ScoredToken] = (), usage: Usage | None = None) -> bytes:
        return self._chunk(index, Delta(content=text), None, tokens, usage)

    def part(self, index: int, part: Part, tokens: Tokens[ScoredToken] = (), usage: Usage | None = None) -> bytes:
        return self._chunk(index, self._delta(index, part), None, tokens, usage)

    def closing(self, index: int, finish: FinishReason, has_calls: bool = False, usage: Usage | None = None) -> bytes:
        return self._chunk(index, Delta(), self._finish(finish, has_calls), usage=usage)

    def ending(self, usage: Usage) -> bytes:
        return (self._event([], usage) if self.has_usage else b"") + STREAM_END

    def failure(self, error: SteelyardError) -> bytes:
        return error_event(error)

    def note(self, field: bytes) -> bytes:
        return with_note(self._event([], None), field)

    # --- whole -----------------------------------------------------------------------------------------------

    def _choice(self, index: int, one: WholeChoice) -> ChatChoice:
        spoken = one.spoken or Spoken(one.text, "", ())
        return ChatChoice(
            index=index,
            message=self._message(index, spoken),
            logprobs=chat_logprobs(one.tokens),
            finish_reason=self._finish(one.finish, bool(spoken.calls)),
        )

    def _message(self, index: int, spoken: Spoken) -> ReplyMessage:
        content = None if (spoken.calls or spoken.reasoning) and not spoken.content else spoken.content
        fields: dict[str, object] = {}
        if spoken.reasoning:
            fields |= {"reasoning_content": spoken.reasoning, "reasoning": spoken.reasoning}
        functions = [CalledFunction(name=call.name, arguments=call.arguments) for call in spoken.calls]
        if functions and self.is_legacy:
            fields["function_call"] = functions[0]
        elif functions:
            calls = enumerate(functions)
            fields["tool_calls"] = [
                ReplyCall(id=self._id(index, at), type="function", function=one) for at, one in calls
            ]
        return with_fields(ReplyMessage(role="assistant", content=content, refusal=None), **fields)

    def _finish(self, finish: FinishReason, has_calls: bool) -> ChatFinish:
        if has_calls and finish is FinishReason.STOP:
            return "function_call" if self.is_legacy else "tool_calls"
        return plain_finish(finish)

    def _id(self, index: int, call: int) -> str:
        name = call_id(self.request_id, index, call)
        return short_id(name) if self.has_short_ids else name

    # --- chunks ----------------------------------------------------------------------------------------------

    def _delta(self, index: int, part: Part) -> Delta:
        match part:
            case Content(text):
                return Delta(content=text)
            case Reasoning(text):
                return Delta(reasoning_content=text, reasoning=text)
            case CallStart(call, name):
                function = DeltaFunction(name=name, arguments="")
                opened = DeltaCall(index=call, id=self._id(index, call), type="function", function=function)
                return self._calling(opened)
            case CallArguments(call, text):
                return self._calling(DeltaCall(index=call, function=DeltaFunction(arguments=text)))

    def _calling(self, call: DeltaCall) -> Delta:
        return Delta(function_call=call.function) if self.is_legacy else Delta(tool_calls=[call])

    def _chunk(
        self,
        index: int,
        delta: Delta,
        finish: ChatFinish | None,
        tokens: Tokens[ScoredToken] = (),
        usage: Usage | None = None,
    ) -> bytes:
        choice = ChunkChoice(index=index, delta=delta, logprobs=chat_logprobs(tokens), finish_reason=finish)
        return self._event([choice], usage)

    def _event(self, choices: list[ChunkChoice], usage: Usage | None) -> bytes:
        chunk = ChatChunk(
            id=f"chatcmpl-{self.request_id}",
            object="chat.completion.chunk",
            created=self.created,
            model=self.model,
            system_fingerprint=self.fingerprint,
            choices=choices,
        )
        return as_event(with_fields(chunk, usage=usage) if self.has_usage else chunk)
