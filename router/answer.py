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
from engine.types import FinishReason, Request, TokenLogprob, TokenOutput
from router.boundary import log_failure
from router.errors import as_steelyard_error, error_event
from router.ledger import Ledger
from router.logprobs import prompt_logprobs, score
from router.metrics import Metrics
from router.replies import STREAM_END, Replies, Usage, WholeChoice, usage_of
from router.text_stream import Piece, TextStream

logger = logging.getLogger(__name__)

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy in between must not collect the events
]


@dataclass(slots=True)
class Choice:
    """One of the answers, as far as it has come."""

    index: int
    texts: TextStream
    finish: FinishReason | None = None
    num_chars: int = 0  # of the tokens that were scored

    def push(self, output: TokenOutput, token_text: Callable[[int], str]) -> Piece:
        piece = self._scored(output, self.texts.push(output.token_ids, output.finish), token_text)
        self.finish = piece.finish
        return piece

    def _scored(self, output: TokenOutput, piece: Piece, token_text: Callable[[int], str]) -> Piece:
        """With its tokens, if they have logprobs: those that count, none after a stop string."""
        if not output.logprobs:
            return piece
        num_after = output.first_index + len(output.token_ids) - self.texts.num_tokens
        counted = output.logprobs[: len(output.logprobs) - num_after]
        tokens = score(output.token_ids, counted, token_text, self.num_chars)
        self.num_chars += sum(len(one.text) for one in tokens)
        return replace(piece, tokens=tokens)


@dataclass(slots=True)
class Generation:
    """What is being generated, and all that is known of it so far. `choices`: by request id, in order.

    The ledger follows the first choice."""

    request: Request
    outputs: AsyncGenerator[TokenOutput]
    cancel: Callable[[str], None]
    choices: dict[str, Choice]
    ledger: Ledger
    token_text: Callable[[int], str]
    num_cached: int = 0
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    end: FinishReason = FinishReason.ABORT  # what it counts as, unless it comes to something better

    @property
    def usage(self) -> Usage:
        num_tokens = sum(choice.texts.num_tokens for choice in self.choices.values())
        return usage_of(len(self.request.prompt_ids), num_tokens, self.num_cached)

    @property
    def first(self) -> Choice:
        return self.choices[self.request.request_id]

    @property
    def is_done(self) -> bool:
        return all(choice.finish is not None for choice in self.choices.values())

    async def next_piece(self) -> tuple[Choice, Piece]:
        """Not to be called once all is done."""
        while True:
            output = await anext(self.outputs, None)
            if output is None:
                raise SteelyardError("The generation ended without a reason")
            choice = self.choices[output.key.request_id]
            if choice.finish is None:
                return choice, await self._piece(choice, output)

    async def _piece(self, choice: Choice, output: TokenOutput) -> Piece:
        if output.error is not None or output.finish is FinishReason.ERROR:
            raise _error_of(output)
        if output.finish is FinishReason.ABORT:
            raise Unavailable("The generation was cancelled")
        self.num_cached = max(self.num_cached, output.cached_tokens)
        self.prompt_logprobs += output.prompt_logprobs
        if choice is self.first:
            self.ledger.take(output)
        piece = choice.push(output, self.token_text)
        if self.is_done:
            await self.outputs.aclose()  # its blocks are free before a slow client has read the end
        elif piece.finish is not None and output.finish is None:
            self.cancel(output.key.request_id)  # a stop string: the others go on
        return piece


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
            logger.info("request %s: the client went away", self._generation.request.request_id)

    async def _run(self, send: Send) -> None:
        one = self._generation
        try:
            async with aclosing(one.outputs):
                choice, piece = await one.next_piece()
                await (self._send_stream if self._stream else self._send_whole)(choice, piece, send)
        except Exception:
            one.end = FinishReason.ERROR
            raise
        finally:
            one.ledger.close(_now_s())
            self._metrics.count_end(one.ledger, one.usage, one.end)

    async def _send_whole(self, choice: Choice, piece: Piece, send: Send) -> None:
        one = self._generation
        pieces: dict[int, list[Piece]] = {each.index: [] for each in one.choices.values()}
        pieces[choice.index].append(piece)
        self._count_sent()
        while not one.is_done:
            choice, piece = await one.next_piece()
            pieces[choice.index].append(piece)
            self._count_sent()
        prompt = prompt_logprobs(one.request.prompt_ids, one.prompt_logprobs, one.token_text)
        wants_prompt = one.request.sampling.prompt_logprobs >= 0
        body = self._replies.whole([*map(_whole, pieces.values())], one.usage, prompt if wants_prompt else None)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        one.end = one.first.finish or one.end

    async def _send_stream(self, choice: Choice, piece: Piece, send: Send) -> None:
        one = self._generation
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        await self._send_events(send, *self._replies.opening(len(one.choices)), *self._events(choice, piece))
        try:
            while not one.is_done:
                choice, piece = await one.next_piece()
                await self._send_events(send, *self._events(choice, piece))
            one.end = one.first.finish or one.end
            last = (self._replies.usage(one.usage) if self._include_usage else b"") + STREAM_END
        except Exception as error:  # it ends the stream it belongs to
            log_failure(one.request.request_id, error)
            one.end = FinishReason.ERROR
            last = error_event(as_steelyard_error(error))
        await send({"type": "http.response.body", "body": last})

    def _events(self, choice: Choice, piece: Piece) -> list[bytes]:
        has_text = piece.text or piece.tokens
        events = [self._replies.text(choice.index, piece.text, piece.tokens)] if has_text else []
        return [*events, self._replies.closing(choice.index, piece.finish)] if piece.finish else events

    async def _send_events(self, send: Send, *events: bytes) -> None:
        """One write for all that came together. A piece that gives no text yet writes nothing."""
        if events:
            await send({"type": "http.response.body", "body": b"".join(events), "more_body": True})
        self._count_sent()

    def _count_sent(self) -> None:
        ledger = self._generation.ledger
        num_new = self._generation.first.texts.num_tokens - ledger.num_tokens
        if num_new > 0:
            is_first = ledger.num_tokens == 0
            self._metrics.count_sent(ledger.sent(num_new, _now_s()), is_first=is_first)


def _whole(pieces: list[Piece]) -> WholeChoice:
    finish = pieces[-1].finish
    assert finish is not None, "the last piece says how it ended"
    text = "".join(piece.text for piece in pieces)
    return WholeChoice(text, finish, [token for piece in pieces for token in piece.tokens])


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
