"""What the OpenAI API answers: whole replies, chunks of a stream, lists of models.

ChatReplies and CompletionReplies speak the two endpoints' dialects of the same generation: of each of its choices an
opening, pieces of text, a closing; the usage; or all of it at once. A field that was not set is left out of the JSON.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from pydantic import BaseModel

from engine.types import FinishReason
from router.logprobs import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprobs,
    ScoredToken,
    chat_logprobs,
    completion_logprobs,
)

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
    prompt_logprobs: PromptLogprobs | None = None


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
    prompt_logprobs: PromptLogprobs | None = None


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


@dataclass(frozen=True, slots=True)
class WholeChoice:
    """One answer, complete."""

    text: str
    finish: FinishReason
    tokens: Tokens[ScoredToken] = ()


class Replies(Protocol):
    """One generation in the words of one endpoint, as JSON. `index` counts its choices."""

    def whole(
        self, choices: Tokens[WholeChoice], usage: Usage, prompt_logprobs: PromptLogprobs | None = None
    ) -> bytes: ...

    def opening(self, num_choices: int) -> Iterator[bytes]: ...

    def text(self, index: int, text: str, tokens: Tokens[ScoredToken] = ()) -> bytes: ...

    def closing(self, index: int, finish: FinishReason) -> bytes: ...

    def usage(self, usage: Usage) -> bytes: ...


def _json(reply: BaseModel) -> bytes:
    return reply.model_dump_json(exclude_unset=True).encode()


Reply = TypeVar("Reply", bound=BaseModel)


def _with(reply: Reply, **fields: object) -> Reply:
    """With fields that are shown because they are set."""
    return reply.model_copy(update=fields)


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

    def whole(self, choices: Tokens[WholeChoice], usage: Usage, prompt_logprobs: PromptLogprobs | None = None) -> bytes:
        whole = [
            ChatChoice(
                index=index,
                message=ReplyMessage(role="assistant", content=one.text, refusal=None),
                logprobs=chat_logprobs(one.tokens),
                finish_reason=_finish(one.finish),
            )
            for index, one in enumerate(choices)
        ]
        name, created = f"chatcmpl-{self.request_id}", self.created
        reply = ChatReply(
            id=name, object="chat.completion", created=created, model=self.model, choices=whole, usage=usage
        )
        return _json(reply if prompt_logprobs is None else _with(reply, prompt_logprobs=prompt_logprobs))

    def opening(self, num_choices: int) -> Iterator[bytes]:
        for index in range(num_choices):
            yield self._chunk(index, Delta(role="assistant", content=""), None)

    def text(self, index: int, text: str, tokens: Tokens[ScoredToken] = ()) -> bytes:
        return self._chunk(index, Delta(content=text), None, tokens)

    def closing(self, index: int, finish: FinishReason) -> bytes:
        return self._chunk(index, Delta(), _finish(finish))

    def usage(self, usage: Usage) -> bytes:
        return self._event([], usage)

    def _chunk(self, index: int, delta: Delta, finish: Finish | None, tokens: Tokens[ScoredToken] = ()) -> bytes:
        choice = ChunkChoice(index=index, delta=delta, logprobs=chat_logprobs(tokens), finish_reason=finish)
        return self._event([choice], None)

    def _event(self, choices: list[ChunkChoice], usage: Usage | None) -> bytes:
        name = f"chatcmpl-{self.request_id}"
        chunk = ChatChunk(
            id=name, object="chat.completion.chunk", created=self.created, model=self.model, choices=choices
        )
        return _event(_with(chunk, usage=usage) if self.has_usage else chunk)


@dataclass(frozen=True, slots=True)
class CompletionReplies:
    """With `has_usage` every chunk has a usage field: null, until the last."""

    request_id: str
    model: str
    created: int
    has_usage: bool = False

    def whole(self, choices: Tokens[WholeChoice], usage: Usage, prompt_logprobs: PromptLogprobs | None = None) -> bytes:
        whole = [_completion(index, one.text, _finish(one.finish), one.tokens) for index, one in enumerate(choices)]
        if prompt_logprobs is not None:
            whole = [_with(choice, prompt_logprobs=prompt_logprobs) for choice in whole]
        return _json(_with(self._reply(whole), usage=usage))

    def opening(self, num_choices: int) -> Iterator[bytes]:
        yield from ()

    def text(self, index: int, text: str, tokens: Tokens[ScoredToken] = ()) -> bytes:
        return self._event([_completion(index, text, None, tokens)], None)

    def closing(self, index: int, finish: FinishReason) -> bytes:
        return self._event([_completion(index, "", _finish(finish))], None)

    def usage(self, usage: Usage) -> bytes:
        return self._event([], usage)

    def _reply(self, choices: list[CompletionChoice]) -> CompletionReply:
        name = f"cmpl-{self.request_id}"
        return CompletionReply(
            id=name, object="text_completion", created=self.created, model=self.model, choices=choices
        )

    def _event(self, choices: list[CompletionChoice], usage: Usage | None) -> bytes:
        chunk = self._reply(choices)
        return _event(_with(chunk, usage=usage) if self.has_usage else chunk)


def _completion(index: int, text: str, finish: Finish | None, tokens: Tokens[ScoredToken] = ()) -> CompletionChoice:
    return CompletionChoice(index=index, text=text, logprobs=completion_logprobs(tokens), finish_reason=finish)
