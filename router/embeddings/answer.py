"""The embeddings of one body as an HTTP answer: awaited all, then sent whole."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import math
import struct
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.errors import SteelyardError
from engine.types import FinishReason, Request, TokenOutput
from router.answer import check_output, while_connected
from router.chunk_form import timeline_field, with_field
from router.embeddings.body import EmbeddingBody
from router.ledger import Ledger, Outcome
from router.metrics import Metrics
from router.replies import Usage, usage_of

FLOAT_BYTES = 4
MOST_ON_LOOP_BYTES = 64 * 2**10  # of vectors; more of them become text in a thread

logger = logging.getLogger(__name__)


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingReply(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


@dataclass(slots=True)
class Embedded:
    """What is being embedded, and what has come of it. The ledger follows the first input."""

    body: EmbeddingBody
    requests: tuple[Request, ...]
    outputs: AsyncGenerator[TokenOutput]
    ledger: Ledger
    vectors: dict[str, bytes] = field(default_factory=dict)  # by request id: float32, little-endian
    num_cached: int = 0

    @property
    def usage(self) -> Usage:
        return usage_of(sum(len(one.prompt_ids) for one in self.requests), 0, self.num_cached)

    async def finish(self) -> None:
        async with aclosing(self.outputs) as outputs:
            async for output in outputs:
                check_output(output)
                self._take(output)
        if len(self.vectors) < len(self.requests):
            raise SteelyardError("The computation ended without an embedding")

    def _take(self, output: TokenOutput) -> None:
        if output.key.request_id == self.requests[0].request_id:
            self.ledger.take(output)
        if output.embedding:
            self.num_cached += output.cached_tokens
            self.vectors[output.key.request_id] = output.embedding

    def as_json(self, model: str) -> bytes:
        """An EmbeddingReply, one vector after the other, so that other threads come to their turns."""
        vectors = [self.vectors[one.request_id] for one in self.requests]
        items = b",".join(_item(index, vector, self.body) for index, vector in enumerate(vectors))
        num_prompt = self.usage.prompt_tokens
        usage = EmbeddingUsage(prompt_tokens=num_prompt, total_tokens=num_prompt).model_dump_json()
        end = f'],"model":{json.dumps(model)},"usage":{usage}}}'
        return b'{"object":"list","data":[' + items + end.encode()


class EmbeddingAnswer(Response):
    """Embeds for as long as its client listens."""

    def __init__(self, embedded: Embedded, model: str, metrics: Metrics) -> None:
        super().__init__()
        self._embedded = embedded
        self._model = model
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not await while_connected(receive, self._run(send)):
            logger.info("request %s: the client went away", self._embedded.requests[0].request_id)

    async def _run(self, send: Send) -> None:
        one, end = self._embedded, FinishReason.ABORT
        try:
            await one.finish()
            body = await self._body()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": body})
            end = FinishReason.STOP
        except Exception:
            end = FinishReason.ERROR
            raise
        finally:
            one.ledger.close(_now_s())
            usage, request_id = one.usage, one.requests[0].request_id
            self._metrics.count_end(one.ledger, usage, end)
            one.ledger.tell(Outcome(request_id, end, usage.prompt_tokens, one.num_cached, 0))

    async def _body(self) -> bytes:
        one = self._embedded
        is_long = sum(map(len, one.vectors.values())) > MOST_ON_LOOP_BYTES
        body = await asyncio.to_thread(one.as_json, self._model) if is_long else one.as_json(self._model)
        if not one.ledger.is_shown:
            return body
        one.ledger.close(_now_s())
        return with_field(body, timeline_field(one.ledger.timeline()))


def _item(index: int, vector: bytes, body: EmbeddingBody) -> bytes:
    size = body.dimensions
    vector = vector if size is None or size * FLOAT_BYTES == len(vector) else cut(vector, size)
    is_text = body.encoding_format == "base64"
    told = base64.b64encode(vector).decode() if is_text else [_shortest(value) for value in _floats(vector)]
    return Embedding(index=index, embedding=told).model_dump_json().encode()


def cut(vector: bytes, size: int) -> bytes:
    """The first `size` numbers, of length 1 again. float32, little-endian."""
    kept = _floats(vector)[:size]
    length = math.hypot(*kept)
    return _packed(value / length if length else 0.0 for value in kept)


def _shortest(value: float) -> float:
    """As few digits as tell a float32 from all others."""
    return float(f"{value:.9g}")


def _floats(vector: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(vector) // FLOAT_BYTES}f", vector)


def _packed(values: Iterable[float]) -> bytes:
    numbers = tuple(values)
    return struct.pack(f"<{len(numbers)}f", *numbers)


def _now_s() -> float:
    return asyncio.get_running_loop().time()
