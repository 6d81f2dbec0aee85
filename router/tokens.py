"""Tokens of a text and text of tokens, as vLLM has them: POST /tokenize and POST /detokenize.

Long ones are worked on in a thread, what is made of them included; what is longer than the bounds is refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from pydantic import BaseModel, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from engine.errors import InvalidRequest, Unavailable
from router.body import read_body
from router.openapi import OF_BODIES, route_docs
from router.schema import ApiModel, ChatBody, Message, StrictBool, StrictInt
from router.text import LONG_TEXT_CHARS, RENDER_TIMEOUT_S, TextModel
from router.tools.schema import Tools

MAX_CHARS = 2**20  # of one text: some hundred milliseconds of a thread
MAX_TOKENS = 2**18


class TokenizeBody(ApiModel):
    """Body of POST /tokenize: either `prompt` or `messages`."""

    model: str | None = None
    prompt: Annotated[str, Field(max_length=MAX_CHARS)] | None = None
    messages: Annotated[tuple[Message, ...], Field(min_length=1)] | None = None
    tools: Tools | None = Field(default=None, description="with messages")
    add_special_tokens: StrictBool | None = Field(
        default=None, description="what the model puts around a prompt, e.g. BOS; true for a prompt, false for messages"
    )
    add_generation_prompt: StrictBool | None = Field(default=None, description="of messages; true unless it is sent")
    return_token_strs: StrictBool | None = Field(default=None, description="also the vocabulary's words for them")

    @field_validator("messages")
    @classmethod
    def _either(cls, value: object, info: ValidationInfo) -> object:
        if value is not None and info.data.get("prompt") is not None:
            raise PydanticCustomError("two_texts", "'prompt' is there, too; send one of the two")
        return value


class DetokenizeBody(ApiModel):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: Annotated[tuple[Annotated[StrictInt, Field(ge=0)], ...], Field(max_length=MAX_TOKENS)]


class TokenizeReply(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeReply(BaseModel):
    prompt: str


async def tokenize(model: TextModel, body: TokenizeBody) -> Response:
    model.check_name(body.model)
    if body.prompt is None and body.messages is None:
        raise InvalidRequest("'prompt': This field is required, or 'messages'", param="prompt")
    num_chars = len(body.prompt or "") + sum(len(message.text) for message in body.messages or ())
    if num_chars > MAX_CHARS:
        raise InvalidRequest(f"'messages': at most {MAX_CHARS} characters in all", param="messages")
    takes_long = body.messages is not None or num_chars > LONG_TEXT_CHARS  # a template may take long over few messages
    return await _answered(takes_long, lambda: _tokenized(model, body))


def _tokenized(model: TextModel, body: TokenizeBody) -> BaseModel:
    if body.messages is None:
        ids = model.tokenizer.encode(body.prompt or "", body.add_special_tokens is not False)
    else:
        chat = ChatBody(model=model.name, messages=body.messages, tools=body.tools)
        text = model.render(chat, add_generation_prompt=body.add_generation_prompt is not False)
        ids = model.tokenizer.encode(text, bool(body.add_special_tokens))
    texts = [model.tokenizer.token_name(one) for one in ids] if body.return_token_strs else None
    return TokenizeReply(count=len(ids), max_model_len=model.max_context, tokens=ids, token_strs=texts)


async def detokenize(model: TextModel, body: DetokenizeBody) -> Response:
    model.check_name(body.model)
    limit = model.tokenizer.vocab_size
    if max(body.tokens, default=0) >= limit:
        raise InvalidRequest(f"'tokens': token ids must be below {limit}", param="tokens")

    def detokenized() -> BaseModel:
        return DetokenizeReply(prompt=model.tokenizer.decode(body.tokens, skip_special=False))

    return await _answered(len(body.tokens) > LONG_TEXT_CHARS, detokenized)


async def _answered(takes_long: bool, work: Callable[[], BaseModel]) -> Response:
    def as_json() -> bytes:
        return work().model_dump_json().encode()

    try:
        data = await asyncio.wait_for(asyncio.to_thread(as_json), RENDER_TIMEOUT_S) if takes_long else as_json()
    except TimeoutError:
        raise Unavailable(f"it took more than {RENDER_TIMEOUT_S:g} s", retry_after_s=1) from None
    return Response(data, media_type="application/json")


def add_token_routes(app: FastAPI, model: TextModel, max_body_bytes: int) -> None:
    @app.post("/tokenize", **route_docs(TokenizeReply, OF_BODIES, "TokenizeBody"))
    async def tokens_of(request: HttpRequest) -> Response:
        """The tokens of a prompt, or of messages by the model's chat template."""
        return await tokenize(model, await read_body(request, TokenizeBody, max_body_bytes))

    @app.post("/detokenize", **route_docs(DetokenizeReply, OF_BODIES, "DetokenizeBody"))
    async def text_of(request: HttpRequest) -> Response:
        """The text of tokens, special ones included."""
        return await detokenize(model, await read_body(request, DetokenizeBody, max_body_bytes))
