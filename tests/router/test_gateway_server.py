"""The app behind a real server, with OpenAI's own client."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Literal

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from engine.errors import Overloaded, Unavailable, WorkerLost
from tests.router.fakes import CHAT, MODEL, FakeGenerator, chat, fail
from tests.router.serving import serve

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]
SAID = "[user]hello[assistant]"
BOTH = pytest.mark.parametrize("http", ["h11", "httptools"])


@pytest.fixture
def generator() -> FakeGenerator:
    return FakeGenerator()


@pytest.fixture
async def client(generator: FakeGenerator) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        serve(generator) as address,
        openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


async def test_chat(client: openai.AsyncOpenAI) -> None:
    reply = await client.chat.completions.create(model=MODEL, messages=HELLO)
    assert reply.choices[0].message.content == SAID
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == 3


async def test_chat_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == SAID
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(SAID) + 1


async def test_a_reply_can_be_sent_back_as_it_came(client: openai.AsyncOpenAI) -> None:
    message = (await client.chat.completions.create(model=MODEL, messages=HELLO)).choices[0].message
    again = [*HELLO, message.model_dump(), *HELLO]
    reply = await client.chat.completions.create(model=MODEL, messages=again)
    assert reply.choices[0].message.content == f"[user]hello[assistant]{SAID}{SAID}"


async def test_completions(client: openai.AsyncOpenAI) -> None:
    reply = await client.completions.create(model=MODEL, prompt="hello", max_tokens=4, extra_body={"top_k": 1})
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == ("hell", "length")
    stream = await client.completions.create(model=MODEL, prompt="hello", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "hello"


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == [MODEL]
    assert (await client.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("other")


async def test_refusals_are_the_clients_own_errors(client: openai.AsyncOpenAI, generator: FakeGenerator) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(model=MODEL, messages=HELLO, temperature=3)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.chat.completions.create(model="other", messages=HELLO)
    assert unknown.value.code == "model_not_found"
    generator.script = fail(Overloaded("full", retry_after_s=3))
    with pytest.raises(openai.RateLimitError) as full:
        await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    assert full.value.response.headers["retry-after"] == "3"
    generator.script = fail(Unavailable("nobody"))
    with pytest.raises(openai.InternalServerError) as nobody:
        await client.chat.completions.create(model=MODEL, messages=HELLO)
    assert nobody.value.status_code == 503


async def test_a_broken_stream_raises_in_the_client(client: openai.AsyncOpenAI, generator: FakeGenerator) -> None:
    generator.script = fail(WorkerLost("the worker is gone"), after=2)
    stream = await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    with pytest.raises(openai.APIError, match="the worker is gone"):
        async for _ in stream:
            pass


@BOTH
async def test_a_body_of_ten_megabytes_is_refused(http: Literal["h11", "httptools"]) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(160):
            yield b" " * 2**16

    async with serve(FakeGenerator(), http) as address, httpx.AsyncClient(base_url=address) as client:
        for body in (b" " * 10 * 2**20, chunks()):
            reply = await client.post(CHAT, content=body)
            assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")
        assert (await client.post(CHAT, json=chat())).status_code == 200
