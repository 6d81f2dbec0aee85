"""Body of POST /v1/embeddings, and what its inputs become: a Request for each, tokenised once and here."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from engine.errors import InvalidRequest, SteelyardError, Unavailable
from engine.types import Request, SamplingParams
from router.errors import shown
from router.schema import ApiModel, Prompt, StrictInt, Text, TokenIds, as_prompts
from router.text import LONG_TEXT_CHARS, RENDER_TIMEOUT_S, Prepared, TextModel

MAX_INPUTS = 2048  # the API's own limit
Several = Field(min_length=1, max_length=MAX_INPUTS)
INPUT_DOCS = Text | Annotated[list[Text], Several] | TokenIds | Annotated[list[TokenIds], Several]


class CannotEmbed(SteelyardError):
    """Nothing says how this model's hidden states become an embedding."""

    code = "model_cannot_embed"
    status = 404


class EmbeddingBody(ApiModel):
    """Body of POST /v1/embeddings. `input` is a tuple of prompts."""

    model: Annotated[str, Field(min_length=1)]
    input: Annotated[
        tuple[Prompt, ...], BeforeValidator(partial(as_prompts, most=MAX_INPUTS), json_schema_input_type=INPUT_DOCS)
    ]
    dimensions: Annotated[StrictInt, Field(ge=1)] | None = Field(
        default=None, description="fewer than the model has, where its files say that its embeddings may be cut"
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        default=None, description="base64: of float32, little-endian"
    )
    user: str | None = Field(default=None, description="taken, without effect")


async def prepare(model: TextModel, body: EmbeddingBody, request_id: str, timeout_s: float) -> Prepared:
    """ModelNotFound, CannotEmbed, or InvalidRequest naming the field at fault."""
    model.check_name(body.model)
    _check_pooling(model, body)
    work = partial(_tokenised, model, body)
    is_long = sum(map(len, body.input)) > LONG_TEXT_CHARS
    try:
        prompts = await asyncio.wait_for(asyncio.to_thread(work), RENDER_TIMEOUT_S) if is_long else work()
    except TimeoutError:
        raise Unavailable(f"the inputs were not tokenised within {RENDER_TIMEOUT_S:g} s", retry_after_s=1) from None
    names = [request_id, *(f"{request_id}-{index}" for index in range(1, len(prompts)))]
    sampling = SamplingParams(max_tokens=1, embed=model.pooling.kind)
    return Prepared(tuple(Request(*one, sampling, timeout_s=timeout_s) for one in zip(names, prompts, strict=True)))


def _check_pooling(model: TextModel, body: EmbeddingBody) -> None:
    pooling, size = model.pooling, body.dimensions
    if not pooling.kind:
        words = f"'{shown(model.name)}' does not embed: {pooling.reason}. `model.pooling: last` or `mean` would say so"
        raise CannotEmbed(words, param="model")
    if size is not None and not pooling.takes(size):
        cuts = f"may be cut to {_cuts(pooling.cuts)}" if pooling.cuts or pooling.cuts_anywhere else "may not be cut"
        words = f"'dimensions': an embedding of this model has {pooling.size}, and {cuts}"
        raise InvalidRequest(words, param="dimensions")


def _cuts(cuts: tuple[int, ...]) -> str:
    return ", ".join(map(str, cuts)) if cuts else "any fewer"


def _tokenised(model: TextModel, body: EmbeddingBody) -> list[tuple[int, ...]]:
    found = [model.ids_of(prompt, "input") for prompt in body.input]
    for ids in found:
        model.room_after("input", len(ids))
    return found
