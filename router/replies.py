"""What the OpenAI API answers: plain completions, lists of models, and what all its answers have in common.

Replies are one generation in the dialect of one endpoint: of each of its choices an opening, pieces of text, a closing;
the usage; or all of it at once. A field that was not set is left out of the JSON. Chats are in chat_replies.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

from pydantic import BaseModel

from engine.errors import SteelyardError
from engine.types import FinishReason
from router.chunk_form import STREAM_END, ChunkForm, with_field
from router.errors import error_event
from router.logprobs import CompletionLogprobs, PromptLogprobs, ScoredToken, completion_logprobs
from router.parts import Part, Spoken


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class CompletionTokensDetails(BaseModel):
    reasoning_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


def usage_of(num_prompt: int, num_completion: int, num_cached: int, num_reasoning: int = 0) -> Usage:
    return Usage(
        prompt_tokens=num_prompt,
        completion_tokens=num_completion,
        total_tokens=num_prompt + num_completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=num_cached),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=num_reasoning),
    )


# --- plain completions ---------------------------------------------------------------------------------------


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    prompt_logprobs: PromptLogprobs | None = None


class CompletionReply(BaseModel):
    """A whole reply and a chunk of a stream alike."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
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


# --- one generation in the words of an endpoint ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WholeChoice:
    """One answer, complete. `text` is all of it, `spoken` what it turned out to be, where that was looked for."""

    text: str
    finish: FinishReason
    tokens: Tokens[ScoredToken] = ()
    spoken: Spoken | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Replies(Protocol):
    """One generation in the words of one endpoint, as JSON. `index` counts its choices; `usage`: so far, if wanted."""

    def whole(self, choices: Tokens[WholeChoice], usage: Usage) -> bytes: ...

    def opening(self, num_choices: int, usage: Usage | None = None) -> Iterator[bytes]: ...

    def text(self, index: int, text: str, tokens: Tokens[ScoredToken] = (), usage: Usage | None = None) -> bytes: ...

    def plain(self, index: int) -> Callable[[str], bytes]:
        """Of this choice: from a text to its event, where nothing else is told with it."""
        ...

    def part(self, index: int, part: Part, tokens: Tokens[ScoredToken] = (), usage: Usage | None = None) -> bytes:
        """What was found in the text, where one looks for that."""
        ...

    def closing(
        self, index: int, finish: FinishReason, has_calls: bool = False, usage: Usage | None = None
    ) -> bytes: ...

    def ending(self, usage: Usage) -> bytes:
        """What follows the last choice's closing."""
        ...

    def failure(self, error: SteelyardError) -> bytes:
        """What follows instead when it breaks off."""
        ...

    def note(self, field: bytes) -> bytes:
        """A chunk without choices, with one field more: '"name":JSON'."""
        ...


Reply = TypeVar("Reply", bound=BaseModel)


def as_json(reply: BaseModel) -> bytes:
    return reply.model_dump_json(exclude_unset=True).encode()


def with_fields(reply: Reply, **fields: object) -> Reply:
    """With fields that are shown because they are set."""
    return reply.model_copy(update=fields)


def as_event(chunk: BaseModel) -> bytes:
    return b"data: " + as_json(chunk) + b"\n\n"


def with_note(event: bytes, field: bytes) -> bytes:
    """An event with one field more."""
    return with_field(event.removesuffix(b"\n\n"), field) + b"\n\n"


def plain_finish(finish: FinishReason) -> Literal["stop", "length"]:
    assert finish in (FinishReason.STOP, FinishReason.LENGTH)  # the others end as errors
    return "stop" if finish is FinishReason.STOP else "length"


@dataclass(slots=True)
class CompletionReplies:
    """With `has_usage` every chunk has a usage field: null, until the last, unless each is to have it."""

    request_id: str
    model: str
    created: int
    fingerprint: str
    has_usage: bool = False
    _form: ChunkForm = field(init=False)

    def __post_init__(self) -> None:
        self._form = ChunkForm(self._text)

    def whole(self, choices: Tokens[WholeChoice], usage: Usage) -> bytes:
        return as_json(with_fields(self._reply([_whole(*one) for one in enumerate(choices)]), usage=usage))

    def opening(self, num_choices: int, usage: Usage | None = None) -> Iterator[bytes]:
        yield from ()

    def text(self, index: int, text: str, tokens: Tokens[ScoredToken] = (), usage: Usage | None = None) -> bytes:
        changes = tokens or usage is not None
        return self._text(index, text, tokens, usage) if changes else self._form.event(index)(text)

    def plain(self, index: int) -> Callable[[str], bytes]:
        return self._form.event(index)

    def _text(self, index: int, text: str, tokens: Tokens[ScoredToken] = (), usage: Usage | None = None) -> bytes:
        return self._event([_completion(index, text, None, tokens)], usage)

    def part(self, index: int, part: Part, tokens: Tokens[ScoredToken] = (), usage: Usage | None = None) -> bytes:
        raise AssertionError("nothing is looked for in a plain completion")

    def closing(self, index: int, finish: FinishReason, has_calls: bool = False, usage: Usage | None = None) -> bytes:
        return self._event([_completion(index, "", plain_finish(finish))], usage)

    def ending(self, usage: Usage) -> bytes:
        return (self._event([], usage) if self.has_usage else b"") + STREAM_END

    def failure(self, error: SteelyardError) -> bytes:
        return error_event(error)

    def note(self, field: bytes) -> bytes:
        return with_note(self._event([], None), field)

    def _reply(self, choices: list[CompletionChoice]) -> CompletionReply:
        return CompletionReply(
            id=f"cmpl-{self.request_id}",
            object="text_completion",
            created=self.created,
            model=self.model,
            system_fingerprint=self.fingerprint,
            choices=choices,
        )

    def _event(self, choices: list[CompletionChoice], usage: Usage | None) -> bytes:
        chunk = self._reply(choices)
        return as_event(with_fields(chunk, usage=usage) if self.has_usage else chunk)


def _whole(index: int, one: WholeChoice) -> CompletionChoice:
    choice = _completion(index, one.text, plain_finish(one.finish), one.tokens)
    return choice if one.prompt_logprobs is None else with_fields(choice, prompt_logprobs=one.prompt_logprobs)


def _completion(
    index: int, text: str, finish: Literal["stop", "length"] | None, tokens: Tokens[ScoredToken] = ()
) -> CompletionChoice:
    return CompletionChoice(index=index, text=text, logprobs=completion_logprobs(tokens), finish_reason=finish)
