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
from dataclasses import dataclass, field, replace

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.errors import SteelyardError, Unavailable, error_from_code
from engine.types import FinishReason, Request, TokenOutput
from router.asked import Asked
from router.boundary import log_failure
from router.chunk_form import before_end, timeline_field, with_field
from router.errors import as_steelyard_error
from router.ledger import Ledger, Outcome
from router.logprobs import score
from router.metrics import Metrics
from router.parts import Content, spoken
from router.reader import AnswerReader
from router.replies import Replies, Usage, WholeChoice, usage_of
from router.tap import WRITE_NOW, Line, Tap
from router.text_stream import Piece, TextStream

logger = logging.getLogger(__name__)

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy in between must not collect the events
]


@dataclass(slots=True)
class Choice:
    """One of the answers, as far as it has come. `reader`: where one looks for what its text is. Of one that
    `is_silent` no token is wanted, only its prompt."""

    index: int
    texts: TextStream
    asked: Asked
    reader: AnswerReader | None = None
    is_silent: bool = False
    finish: FinishReason | None = None
    num_chars: int = 0  # of the tokens that were scored
    logprob: float = 0.0  # of all its tokens together
    has_begun: bool = False

    @property
    def num_tokens(self) -> int:
        return 0 if self.is_silent else self.texts.num_tokens

    @property
    def mean_logprob(self) -> float:
        return self.logprob / max(1, self.num_tokens)

    @property
    def has_calls(self) -> bool:
        return self.reader is not None and self.reader.has_calls

    def push(self, output: TokenOutput, token_text: Callable[[int], str]) -> Piece:
        if self.is_silent:
            piece = Piece("", FinishReason.LENGTH)
        else:
            piece = self._scored(output, self.texts.push(output.token_ids, output.finish), token_text)
        self.finish = piece.finish
        if not self.has_begun:
            piece = self._echoed(piece, token_text)
        if self.reader is None:
            return piece
        return replace(piece, parts=self.reader.read(piece.text, is_last=piece.finish is not None))

    def _echoed(self, piece: Piece, token_text: Callable[[int], str]) -> Piece:
        self.has_begun = True
        echoed = self.asked.echoed(token_text)
        if not echoed and not self.asked.echo:
            return piece
        num_chars = sum(len(one.text) for one in echoed)
        self.num_chars += num_chars
        tokens = (replace(one, offset=one.offset + num_chars) for one in piece.tokens)
        return replace(piece, text=self.asked.echo + piece.text, tokens=(*echoed, *tokens))

    def _scored(self, output: TokenOutput, piece: Piece, token_text: Callable[[int], str]) -> Piece:
        """With its tokens, if they have logprobs: those that count, none after a stop string."""
        if not output.logprobs:
            return piece
        num_after = output.first_index + len(output.token_ids) - self.texts.num_tokens
        counted = output.logprobs[: len(output.logprobs) - num_after]
        tokens = score(output.token_ids, counted, token_text, self.num_chars)
        self.num_chars += sum(len(one.text) for one in tokens)
        self.logprob += sum(one.logprob for one in counted)
        return replace(piece, tokens=tokens)


@dataclass(slots=True)
class Generation:
    """What is being generated, and all that is known of it so far. `choices`: by request id, in order; of those to one
    prompt the `num_sent` likeliest are sent. `shows_logprobs`: they were asked for, not only needed to choose.

    The ledger follows the first choice."""

    request: Request
    outputs: AsyncGenerator[TokenOutput]
    cancel: Callable[[str], None]
    tap: Callable[[str, Callable[[TokenOutput], bool]], None]  # see router.api.Generator
    choices: dict[str, Choice]
    ledger: Ledger
    token_text: Callable[[int], str]
    num_sent: int
    shows_logprobs: bool = True
    charge: Callable[[int, float], None] = lambda _num_tokens, _now_s: None  # generated tokens, to whom they count
    end: FinishReason = FinishReason.ABORT  # what it counts as, unless it comes to something better
    _waiting: list[TokenOutput] = field(default_factory=list)  # for the logprobs of the prompt they begin with

    @property
    def usage(self) -> Usage:
        choices = self.choices.values()
        num_prompt = sum(len(asked.request.prompt_ids) for asked in self.asked)
        num_cached = sum(asked.num_cached for asked in self.asked)
        num_reasoning = sum(choice.texts.num_reasoning for choice in choices)
        return usage_of(num_prompt, sum(choice.num_tokens for choice in choices), num_cached, num_reasoning)

    @property
    def asked(self) -> list[Asked]:
        """The prompts, in order."""
        return list({id(choice.asked): choice.asked for choice in self.choices.values()}.values())

    @property
    def first(self) -> Choice:
        return self.choices[self.request.request_id]

    @property
    def is_done(self) -> bool:
        if len(self.choices) == 1:
            return self.first.finish is not None
        return all(choice.finish is not None for choice in self.choices.values())

    @property
    def sent(self) -> list[Choice]:
        """The choices that a whole answer has, in order: the likeliest ones to each prompt. For when all are done."""
        chosen: list[Choice] = []
        for asked in self.asked:
            own = [choice for choice in self.choices.values() if choice.asked is asked]
            chosen += (
                sorted(own, key=lambda one: -one.mean_logprob)[: self.num_sent] if len(own) > self.num_sent else own
            )
        return chosen

    @property
    def is_plain(self) -> bool:
        """One answer, of which nothing but its text is wanted."""
        first = self.first
        scored = self.request.sampling.logprobs >= 0
        return len(self.choices) == 1 and first.reader is None and first.texts.is_plain and not scored

    async def next_piece(self) -> tuple[Choice, Piece]:
        """Not to be called once all is done."""
        while True:
            output = self._next_waiting() or await anext(self.outputs, None)
            if output is None:
                raise SteelyardError("The generation ended without a reason")
            self.charge(len(output.token_ids), _now_s())
            choice = self.choices[output.key.request_id]
            if choice.finish is None:
                check_output(output)
                choice.asked.take(output)
                if choice.asked.can_be_echoed:
                    return choice, await self._piece(choice, output)
                self._waiting.append(output)

    def _next_waiting(self) -> TokenOutput | None:
        ready = (one for one in self._waiting if self.choices[one.key.request_id].asked.can_be_echoed)
        output = next(ready, None)
        if output is not None:
            self._waiting.remove(output)
        return output

    async def _piece(self, choice: Choice, output: TokenOutput) -> Piece:
        if choice is self.first:
            self.ledger.take(output)
        piece = choice.push(output, self.token_text)
        if self.is_done:
            await self.outputs.aclose()  # its blocks are free before a slow client has read the end
        elif piece.finish is not None and output.finish is None:
            self.cancel(output.key.request_id)  # a stop string: the others go on
        return piece if self.shows_logprobs or not piece.tokens else replace(piece, tokens=())


class Answer(Response):
    """Runs a generation for as long as its client listens."""

    def __init__(
        self, generation: Generation, replies: Replies, metrics: Metrics, *, stream: bool, counts_on: bool = False
    ) -> None:
        """`counts_on`: every chunk of a stream tells the usage so far."""
        super().__init__()
        self._counts_on = counts_on
        self._generation = generation
        self._replies = replies
        self._metrics = metrics
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        line = scope.get("extensions", {}).get(WRITE_NOW, {}).get("line")
        if not await while_connected(receive, self._run(send, line)):
            logger.info("request %s: the client went away", self._generation.request.request_id)

    async def _run(self, send: Send, line: Line | None) -> None:
        one = self._generation
        try:
            async with aclosing(one.outputs):
                choice, piece = await one.next_piece()
                if self._stream:
                    await self._send_stream(choice, piece, send, line)
                else:
                    await self._send_whole(choice, piece, send)
        except Exception:
            one.end = FinishReason.ERROR
            raise
        finally:
            one.ledger.close(_now_s())
            usage = one.usage
            self._metrics.count_end(one.ledger, usage, one.end)
            one.ledger.tell(_outcome(one, usage))

    async def _send_whole(self, choice: Choice, piece: Piece, send: Send) -> None:
        one = self._generation
        pieces: dict[int, list[Piece]] = {each.index: [] for each in one.choices.values()}
        pieces[choice.index].append(piece)
        self._count_sent()
        while not one.is_done:
            choice, piece = await one.next_piece()
            pieces[choice.index].append(piece)
            self._count_sent()
        sent = [_whole(choice, pieces[choice.index], one.token_text) for choice in one.sent]
        body = self._replies.whole(sent, one.usage)
        if one.ledger.is_shown:
            body = with_field(body, self._timeline())
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        one.end = one.first.finish or one.end

    async def _send_stream(self, choice: Choice, piece: Piece, send: Send, line: Line | None) -> None:
        one = self._generation
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        opening = self._replies.opening(len(one.choices), self._usage)
        await self._send_events(send, *opening, *self._events(choice, piece))
        tap = self._open_tap(line)
        try:
            while not one.is_done:
                choice, piece = await one.next_piece()
                if tap is not None and tap.fault is not None:
                    raise tap.fault
                await self._send_events(send, *self._events(choice, piece))
            one.end = one.first.finish or one.end
            last = self._replies.ending(one.usage)
        except Exception as error:  # it ends the stream it belongs to
            log_failure(one.request.request_id, error)
            one.end = FinishReason.ERROR
            last = self._replies.failure(as_steelyard_error(error))
        if one.ledger.is_shown:
            last = before_end(last, self._replies.note(self._timeline()))
        await send({"type": "http.response.body", "body": last})

    def _open_tap(self, line: Line | None) -> Tap | None:
        """What comes from now on is sent past this task, where that can be."""
        one = self._generation
        if line is None or self._counts_on or not one.is_plain:
            return None
        first = one.first
        event, now_s = self._replies.plain(first.index), asyncio.get_running_loop().time
        tap = Tap(line, first.texts, one.ledger, event, self._metrics.count_next, one.charge, now_s)
        one.tap(one.request.request_id, tap.take)
        return tap

    def _timeline(self) -> bytes:
        """So far: what still happens is sending it."""
        ledger = self._generation.ledger
        ledger.close(_now_s())
        return timeline_field(ledger.timeline())

    def _events(self, choice: Choice, piece: Piece) -> list[bytes]:
        usage, index = self._usage, choice.index
        if choice.reader is None:
            has_text = piece.text or piece.tokens
            events = [self._replies.text(index, piece.text, piece.tokens, usage)] if has_text else []
        else:
            events = self._part_events(choice, piece)
        return (
            [*events, self._replies.closing(index, piece.finish, choice.has_calls, usage)] if piece.finish else events
        )

    def _part_events(self, choice: Choice, piece: Piece) -> list[bytes]:
        """The tokens come with the first part, or with an empty one."""
        parts = piece.parts or ((Content(""),) if piece.tokens else ())
        tokens = (piece.tokens, *(() for _ in parts[1:]))
        return [self._replies.part(choice.index, *one, self._usage) for one in zip(parts, tokens, strict=False)]

    @property
    def _usage(self) -> Usage | None:
        return self._generation.usage if self._counts_on else None

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


def _outcome(one: Generation, usage: Usage) -> Outcome:
    num_cached = usage.prompt_tokens_details.cached_tokens
    return Outcome(one.request.request_id, one.end, usage.prompt_tokens, num_cached, usage.completion_tokens)


def _whole(choice: Choice, pieces: list[Piece], token_text: Callable[[int], str]) -> WholeChoice:
    finish = pieces[-1].finish
    assert finish is not None, "the last piece says how it ended"
    text = "".join(piece.text for piece in pieces)
    tokens = [token for piece in pieces for token in piece.tokens]
    said = None if choice.reader is None else spoken(part for piece in pieces for part in piece.parts)
    return WholeChoice(text, finish, tokens, said, choice.asked.told(token_text))


def check_output(output: TokenOutput) -> None:
    """Raises what it says of a failure."""
    if output.error is not None or output.finish is FinishReason.ERROR:
        raise _error_of(output)
    if output.finish is FinishReason.ABORT:
        raise Unavailable("The generation was cancelled")


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
