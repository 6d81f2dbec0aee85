"""Small real stand-ins for the HTTP face's neighbours: a tokenizer of bytes, and a Generator that follows a script."""

from __future__ import annotations

import asyncio
import codecs
import json
import math
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace

import httpx
from fastapi import FastAPI

from engine.errors import InvalidRequest
from engine.models.pooling import Pooling
from engine.types import FinishReason, Request, TokenLogprob, TokenOutput
from router.api import Generator, HealthView, WorkerView
from router.chat_style import PLAIN_STYLE, ChatStyle
from router.config import RouterConfig
from router.gateway import create_app
from router.step_history import StepHistory
from router.text import TextModel

MODEL = "tiny/bytes"
POOLING = Pooling("last", size=4, cuts=(2,))
MAX_CONTEXT = 256
BOS, EOS, VOCAB = 256, 257, 258
CREATED = 1_700_000_000
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

Script = Callable[[Request], AsyncIterator[TokenOutput]]


class ByteTokenizer:
    """A token is a byte; a message is its role in brackets and its content."""

    vocab_size = VOCAB

    def encode(self, text: str, add_special: bool) -> list[int]:
        return [BOS] * add_special + list(text.encode())

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return bytes(one for one in ids if one < 256).decode("utf-8", "replace")

    def token_name(self, token_id: int) -> str:
        return {BOS: "<bos>", EOS: "<eos>"}.get(token_id, f"<0x{token_id:02X}>")

    def token_text(self, token_id: int) -> str:
        return bytes([token_id]).decode("utf-8", "replace") if token_id < 256 else ""

    def special_id(self, token: str) -> int | None:
        return None

    def render_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """Tools and variables are written out in front, calls behind their message; `ends_with` ends the prompt."""
        if any(message["content"] == "unspeakable" for message in messages):
            raise InvalidRequest("the template refuses these messages", param="messages")
        told = {name: value for name, value in (variables or {}).items() if name != "ends_with"}
        front = "".join(f"[{json.dumps(one)}]" for one in (tools, told) if one)
        said = "".join(f"[{m['role']}]{m['content']}{_calls_of(m)}" for m in messages)
        return front + said + "[assistant]" * add_generation_prompt + str((variables or {}).get("ends_with", ""))


def _calls_of(message: Mapping[str, object]) -> str:
    return json.dumps(message["tool_calls"]) if "tool_calls" in message else ""


class ByteDetokenizer:
    def __init__(self, _shown: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        return self._decoder.decode(bytes(one for one in ids if one < 256))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


def output(request: Request, first_index: int, ids: tuple[int, ...], finish: FinishReason | None = None) -> TokenOutput:
    return TokenOutput(request.key, first_index, ids, finish, cached_tokens=3, stages=(("decode", 0.001),))


def vector_of(prompt_ids: Sequence[int]) -> bytes:
    """As TokenOutput.embedding: of length 1, and of each prompt another."""
    numbers = (float(len(prompt_ids)), *map(float, (prompt_ids[-1], sum(prompt_ids), 1)))
    return struct.pack("<4f", *(number / math.hypot(*numbers) for number in numbers))


async def echo(request: Request) -> AsyncIterator[TokenOutput]:
    """The prompt's bytes again, one by one; then the end of sequence, unless max_tokens comes first."""
    if request.sampling.embed:
        yield TokenOutput(
            request.key, 0, (), FinishReason.STOP, cached_tokens=3, embedding=vector_of(request.prompt_ids)
        )
        return
    ids = [one for one in request.prompt_ids if one < 256] + [EOS]
    limit = request.sampling.max_tokens
    for index, one in enumerate(ids[:limit]):
        await asyncio.sleep(0)
        finish = FinishReason.STOP if one == EOS else FinishReason.LENGTH if index + 1 == limit else None
        yield output(request, index, (one,), finish)


def say(text: str, size: int = 1, finish: FinishReason = FinishReason.LENGTH) -> Script:
    """Always this text, `size` tokens at a time."""

    async def script(request: Request) -> AsyncIterator[TokenOutput]:
        ids = tuple(text.encode())
        for start in range(0, len(ids), size):
            await asyncio.sleep(0)
            last = start + size >= len(ids)
            yield output(request, start, ids[start : start + size], finish if last else None)

    return script


def say_with_logprobs(text: str, size: int = 1) -> Script:
    """This text; a token's logprob is minus its byte / 100, and the next bytes are the likelier ones."""

    async def script(request: Request) -> AsyncIterator[TokenOutput]:
        def scored(byte: int) -> TokenLogprob:
            top = tuple((byte + step, -step / 100) for step in range(1, request.sampling.logprobs + 1))
            return TokenLogprob(-byte / 100, 2, top)

        async for one in say(text, size)(request):
            wanted = request.sampling.logprobs >= 0
            yield replace(one, logprobs=tuple(map(scored, one.token_ids)) if wanted else ())

    return script


def fail(error: Exception, after: int = 0) -> Script:
    """Some tokens, then an error."""

    async def script(request: Request) -> AsyncIterator[TokenOutput]:
        for index in range(after):
            await asyncio.sleep(0)
            yield output(request, index, (ord("x"),))
        raise error

    return script


def stall(after: int = 0) -> Script:
    """Some tokens, then nothing ever."""

    async def script(request: Request) -> AsyncIterator[TokenOutput]:
        for index in range(after):
            yield output(request, index, (ord("x"),))
        await asyncio.Event().wait()

    return script


class FakeGenerator:
    """`live` are the requests that were begun and not closed."""

    def __init__(self, script: Script = echo) -> None:
        self.script = script
        self.requests: list[Request] = []
        self.live: dict[str, Request] = {}
        self.cancelled: list[str] = []
        self.started = asyncio.Event()
        self.closed = asyncio.Event()
        self.view = healthy()
        self._num_ids = 0

    async def generate(self, request: Request, *siblings: Request) -> AsyncGenerator[TokenOutput, None]:
        """One output of each in turn; those that were cancelled say ABORT."""
        scripts = [self._generate(one) for one in (request, *siblings)]
        open_scripts = dict(zip((request, *siblings), scripts, strict=True))
        try:
            while open_scripts:
                for one, script in list(open_scripts.items()):
                    is_cancelled = one.request_id in self.cancelled
                    cancelled = output(one, 0, (), FinishReason.ABORT) if is_cancelled else None
                    said = cancelled or await anext(script, None)
                    if said is None or said.finish:
                        del open_scripts[one]
                    if said is not None:
                        yield said
        finally:
            for script in scripts:
                await script.aclose()

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    def tap(self, request_id: str, take: Callable[[TokenOutput], bool]) -> None:
        """Its outputs are all the iterator's."""

    async def _generate(self, request: Request) -> AsyncGenerator[TokenOutput, None]:
        self.requests.append(request)
        self.live[request.request_id] = request
        self.started.set()
        try:
            async with aclosing(self.script(request)) as outputs:  # type: ignore[type-var]
                async for one in outputs:
                    yield one
        finally:
            del self.live[request.request_id]
            self.closed.set()

    def new_request_id(self) -> str:
        self._num_ids += 1
        return f"r{self._num_ids}"

    def new_seed(self) -> int:
        return 42

    def health(self) -> HealthView:
        return self.view


def worker(worker_id: str = "p0", role: str = "prefill", num_leaked_blocks: int = 0) -> WorkerView:
    return WorkerView(worker_id, "i1", role, "127.0.0.1:1", True, 2, 1, 100, 75, num_leaked_blocks, 40, 30, 5, 8, 6)


def healthy(*workers: WorkerView) -> HealthView:
    return HealthView(True, "", 0.5, 7, workers or (worker(), worker("d0", "decode")), 0)


def text_model(style: ChatStyle = PLAIN_STYLE, pooling: Pooling = POOLING) -> TextModel:
    max_context = MAX_CONTEXT if style is PLAIN_STYLE else 10 * MAX_CONTEXT
    return TextModel(MODEL, max_context, ByteTokenizer(), ByteDetokenizer, style, pooling)


def make_app(generator: Generator, style: ChatStyle = PLAIN_STYLE, **settings: float) -> FastAPI:
    config = RouterConfig.model_validate(settings)
    model, steps = text_model(style), StepHistory()
    return create_app(generator, model, config, steps=steps, wall_clock=lambda: CREATED + 0.5, version="1.2.3")


def make_client(generator: FakeGenerator, style: ChatStyle = PLAIN_STYLE, **settings: float) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(make_app(generator, style, **settings))
    return httpx.AsyncClient(transport=transport, base_url="http://gateway")


def chat(content: object = "hello", **fields: object) -> dict[str, object]:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}


def completion(prompt: object = "hello", **fields: object) -> dict[str, object]:
    return {"model": MODEL, "prompt": prompt, **fields}


def events(reply: httpx.Response) -> list[dict]:
    """The JSON of a stream's events; checks the framing and that [DONE] comes last, if at all."""
    lines = reply.text.split("\n\n")
    assert lines.pop() == ""
    assert all(line.startswith("data: ") for line in lines)
    data = [line.removeprefix("data: ") for line in lines]
    if data[-1] == "[DONE]":
        data.pop()
    return [json.loads(one) for one in data]
