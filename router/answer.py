"""One generation as an HTTP answer, whole or as a stream of server-sent events.

1. The first output is awaited before anything is sent, so that a refusal gets its own status.
2. Outputs become text and leave as they come; the ledger takes the times.
3. A stop string, a fault or a client that goes away closes the generator, which aborts the request.
4. A fault after the answer began is the stream's last event.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, replace

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.errors import SteelyardError, Unavailable, error_from_code
from engine.types import FinishReason, TokenOutput
from router.boundary import log_failure
from router.errors import as_steelyard_error, error_event
from router.ledger import Ledger
from router.logprobs import score
from router.metrics import Metrics
from router.replies import STREAM_END, Replies, Usage, usage_of
from router.text_stream import Piece, TextStream

logger = logging.getLogger(__name__)

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy in between must not collect the events
]


@dataclass(slots=True)
class Generation:
    """What is being generated, and all that is known of it so far."""

    request_id: str
    num_prompt: int
    outputs: AsyncGenerator[TokenOutput]
    texts: TextStream
    ledger: Ledger
    token_text: Callable[[int], str]
    num_cached: int = 0
    num_chars: int = 0  # of the tokens that were scored
    end: FinishReason = FinishReason.ABORT  # what it counts as, unless it comes to something better

    @property
    def usage(self) -> Usage:
        return usage_of(self.num_prompt, self.texts.num_tokens, self.num_cached)

    async def next_piece(self) -> Piece:
        output = await anext(self.outputs, None)
        if output is None:
            raise SteelyardError("The generation ended without a reason")
        if output.error is not None or output.finish is FinishReason.ERROR:
            raise _error_of(output)
        if output.finish is FinishReason.ABORT:
            raise Unavailable("The generation was cancelled")
        self.num_cached = max(self.num_cached, output.cached_tokens)
        self.ledger.add_stages(output.stages)
        piece = self._scored(output, self.texts.push(output.token_ids, output.finish))
        if piece.finish is not None:
            await self.outputs.aclose()  # its blocks are free before a slow client has read the end
        return piece

    def _scored(self, output: TokenOutput, piece: Piece) -> Piece:
        """With its tokens, if they have logprobs: those that count, none after a stop string."""
        if not output.logprobs:
            return piece
        num_after = output.first_index + len(output.token_ids) - self.texts.num_tokens
        counted = output.logprobs[: len(output.logprobs) - num_after]
        tokens = score(output.token_ids, counted, self.token_text, self.num_chars)
        self.num_chars += sum(len(one.text) for one in tokens)
        return replace(piece, tokens=tokens)


class Answer(Response):
    """Runs a generation for as long as its client listens."""

    def __init__(
        self, generation: Generation, replies: Replies, metrics: Metrics, *, stream: bool, include_usage: bool
    ) -> None:
        super().__init__()
        self._generation = generation
        self._replies = replies
        self._metrics = metrics
        self._stream = stream
        self._include_usage = include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not await while_connected(receive, self._run(send)):
            logger.info("request %s: the client went away", self._generation.request_id)

    async def _run(self, send: Send) -> None:
        one = self._generation
        try:
            async with aclosing(one.outputs):
                first = await one.next_piece()
                await (self._send_stream(first, send) if self._stream else self._send_whole(first, send))
        except Exception:
            one.end = FinishReason.ERROR
            raise
        finally:
            one.ledger.close(_now_s())
            self._metrics.count_end(one.ledger, one.usage, one.end)

    async def _send_whole(self, piece: Piece, send: Send) -> None:
        one = self._generation
        texts, tokens = [piece.text], [*piece.tokens]
        self._count_sent()
        while piece.finish is None:
            piece = await one.next_piece()
            texts.append(piece.text)
            tokens += piece.tokens
            self._count_sent()
        body = self._replies.whole("".join(texts), piece.finish, one.usage, tokens)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        one.end = piece.finish

    async def _send_stream(self, piece: Piece, send: Send) -> None:
        one = self._generation
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        await self._send_events(send, *self._replies.opening(), *self._events(piece))
        try:
            while piece.finish is None:
                piece = await one.next_piece()
                await self._send_events(send, *self._events(piece))
            one.end = piece.finish
            last = (self._replies.usage(one.usage) if self._include_usage else b"") + STREAM_END
        except Exception as error:  # it ends the stream it belongs to
            log_failure(one.request_id, error)
            one.end = FinishReason.ERROR
            last = error_event(as_steelyard_error(error))
        await send({"type": "http.response.body", "body": last})

    def _events(self, piece: Piece) -> list[bytes]:
        events = [self._replies.text(piece.text, piece.tokens)] if piece.text or piece.tokens else []
        return [*events, self._replies.closing(piece.finish)] if piece.finish else events

    async def _send_events(self, send: Send, *events: bytes) -> None:
        """One write for all that came together. A piece that gives no text yet writes nothing."""
        if events:
            await send({"type": "http.response.body", "body": b"".join(events), "more_body": True})
        self._count_sent()

    def _count_sent(self) -> None:
        ledger = self._generation.ledger
        num_new = self._generation.texts.num_tokens - ledger.num_tokens
        if num_new > 0:
            is_first = ledger.num_tokens == 0
            self._metrics.count_sent(ledger.sent(num_new, _now_s()), is_first=is_first)


def _error_of(output: TokenOutput) -> SteelyardError:
    if output.error is None:
        return SteelyardError("The generation failed")
    return error_from_code(output.error.code, output.error.message)


def _now_s() -> float:
    return asyncio.get_running_loop().time()


async def while_connected(receive: Receive, work: Coroutine[object, object, None]) -> bool:
    """Do the work; cancel it when the client goes away. True if it was done. Call after the body was read."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        done = task.done()
        if done:
            task.result()
        return done
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
