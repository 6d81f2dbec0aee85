"""What the OpenAI API answers: whole replies, chunks of a stream, lists of models.

ChatReplies and CompletionReplies speak the two endpoints' dialects of the same generation: an opening, pieces
of text, a closing, the usage; or all of it at once. A field that was not set is left out of the JSON.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from typing import Literal, Protocol

from pydantic import BaseModel

from engine.types import FinishReason
from router.logprobs import ChatLogprobs, CompletionLogprobs, ScoredToken, chat_logprobs, completion_logprobs

Finish = Literal["stop", "length"]
STREAM_END = b"data: [DONE]\n\n"


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


def usage_of(num_prompt: int, num_completion: int, num_cached: int) -> Usage:
    return Usage(
        prompt_tokens=num_prompt,
        completion_tokens=num_completion,
        total_tokens=num_prompt + num_completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=num_cached),
    )


# --- chat ----------------------------------------------------------------------------------------------------


class ReplyMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class ChatReply(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str = ""


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


# --- plain completions ---------------------------------------------------------------------------------------


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None


class CompletionReply(BaseModel):
    """A whole reply and a chunk of a stream alike."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


# --- models --------------------------------------------------------------------------------------------------


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "steelyard"
    max_model_len: int  # an extension that peers have too: prompt and answer together, in tokens


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


# --- the two dialects ----------------------------------------------------------------------------------------


class Replies(Protocol):
    """One generation in the words of one endpoint, as JSON."""

    def whole(self, text: str, finish: FinishReason, usage: Usage, tokens: Tokens[ScoredToken] = ()) -> bytes: ...

    def opening(self) -> Iterator[bytes]: ...

    def text(self, text: str, tokens: Tokens[ScoredToken] = ()) -> bytes: ...

    def closing(self, finish: FinishReason) -> bytes: ...

    def usage(self, usage: Usage) -> bytes: ...


def _json(reply: BaseModel) -> bytes:
    return reply.model_dump_json(exclude_unset=True).encode()


def _event(chunk: BaseModel) -> bytes:
    return b"data: " + _json(chunk) + b"\n\n"


def _finish(finish: FinishReason) -> Finish:
    assert finish in (FinishReason.STOP, FinishReason.LENGTH)  # the others end as errors
    return "stop" if finish is FinishReason.STOP else "length"


@dataclass(frozen=True, slots=True)
class ChatReplies:
    """With `has_usage` every chunk has a usage field: null, until the last."""

    request_id: str
    model: str
    created: int
    has_usage: bool = False

    def whole(self, text: str, finish: FinishReason, usage: Usage, tokens: Tokens[ScoredToken] = ()) -> bytes:
        message = ReplyMessage(role="assistant", content=text, refusal=None)
        choice = ChatChoice(index=0, message=message, logprobs=chat_logprobs(tokens), finish_reason=_finish(finish))
        name = f"chatcmpl-{self.request_id}"
        return _json(
            ChatReply(
                id=name, object="chat.completion", created=self.created, model=self.model, choices=[choice], usage=usage
            )
        )

    def opening(self) -> Iterator[bytes]:
        yield self._chunk(Delta(role="assistant", content=""), None)

    def text(self, text: str, tokens: Tokens[ScoredToken] = ()) -> bytes:
        return self._chunk(Delta(content=text), None, tokens)

    def closing(self, finish: FinishReason) -> bytes:
        return self._chunk(Delta(), _finish(finish))

    def usage(self, usage: Usage) -> bytes:
        return self._event([], usage)

    def _chunk(self, delta: Delta, finish: Finish | None, tokens: Tokens[ScoredToken] = ()) -> bytes:
        choice = ChunkChoice(index=0, delta=delta, logprobs=chat_logprobs(tokens), finish_reason=finish)
        return self._event([choice], None)

    def _event(self, choices: list[ChunkChoice], usage: Usage | None) -> bytes:
        name = f"chatcmpl-{self.request_id}"
        chunk = ChatChunk(
            id=name, object="chat.completion.chunk", created=self.created, model=self.model, choices=choices
        )
        return _event(chunk.model_copy(update={"usage": usage}) if self.has_usage else chunk)


@dataclass(frozen=True, slots=True)
class CompletionReplies:
    """With `has_usage` every chunk has a usage field: null, until the last."""

    request_id: str
    model: str
    created: int
    has_usage: bool = False

    def whole(self, text: str, finish: FinishReason, usage: Usage, tokens: Tokens[ScoredToken] = ()) -> bytes:
        return _json(self._reply(text, _finish(finish), tokens).model_copy(update={"usage": usage}))

    def opening(self) -> Iterator[bytes]:
        yield from ()

    def text(self, text: str, tokens: Tokens[ScoredToken] = ()) -> bytes:
        return self._event(self._reply(text, None, tokens), None)

    def closing(self, finish: FinishReason) -> bytes:
        return self._event(self._reply("", _finish(finish)), None)

    def usage(self, usage: Usage) -> bytes:
        return self._event(self._reply("", None).model_copy(update={"choices": []}), usage)

    def _reply(self, text: str, finish: Finish | None, tokens: Tokens[ScoredToken] = ()) -> CompletionReply:
        choice = CompletionChoice(index=0, text=text, logprobs=completion_logprobs(tokens), finish_reason=finish)
        name = f"cmpl-{self.request_id}"
        return CompletionReply(
            id=name, object="text_completion", created=self.created, model=self.model, choices=[choice]
        )

    def _event(self, chunk: CompletionReply, usage: Usage | None) -> bytes:
        return _event(chunk.model_copy(update={"usage": usage}) if self.has_usage else chunk)
