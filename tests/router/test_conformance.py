"""OpenAI's own client, async and sync, against a real server; every answer and event against the published schemas."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import openai
import pytest

from engine.errors import WorkerLost
from tests.cluster.serving import serve
from tests.openai_schemas import check_schema
from tests.router.fakes import MODEL, FakeGenerator, Script, echo, fail, say_with_logprobs

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
SAID = "[user]hello[assistant]"
USAGE = {"include_usage": True}

# What is asked, by the endpoint; each whole and as a stream, by both clients.
CHATS: list[dict[str, Any]] = [
    {},
    {"n": 3, "max_tokens": 4},
    {"logprobs": True, "top_logprobs": 3, "stop": ["zz"], "temperature": 0.5, "seed": 7},
    {"max_completion_tokens": 2, "logit_bias": {"65": 1}, "presence_penalty": 1, "frequency_penalty": -1, "user": "u"},
]
COMPLETIONS: list[dict[str, Any]] = [
    {},
    {"n": 2, "max_tokens": 3},
    {"logprobs": 3, "stop": "zz", "temperature": 0, "top_p": 0.5},
    {"prompt": [104, 105], "max_tokens": 1},
]
RESPONSES: list[dict[str, Any]] = [
    {},
    {"instructions": "be brief", "max_output_tokens": 3, "metadata": {"a": "b"}, "store": False},
    {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "text": {"format": {"type": "text"}}},
    {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}], "reasoning": {"effort": None}},
]
SCHEMAS = {
    "chat": ("CreateChatCompletionResponse", "CreateChatCompletionStreamResponse"),
    "completions": ("CreateCompletionResponse", "CreateCompletionResponse"),
    "responses": ("Response", "ResponseStreamEvent"),
}
CASES = [("chat", case) for case in CHATS] + [("completions", case) for case in COMPLETIONS]
CASES += [("responses", case) for case in RESPONSES]
SCRIPTS: list[Script] = [echo, say_with_logprobs("naïve 日本", size=2)]


def creator(client: Any, endpoint: str, *, raw: bool) -> Callable[..., Any]:
    """The client's method; with `raw` it gives the answer's text beside what it makes of it."""
    resource = client.chat.completions if endpoint == "chat" else getattr(client, endpoint)
    return resource.with_raw_response.create if raw else resource.create


def fields_of(endpoint: str, case: dict[str, Any], *, stream: bool) -> dict[str, Any]:
    said = {"chat": {"messages": HELLO}, "completions": {"prompt": "hello"}, "responses": {"input": "hello"}}[endpoint]
    streamed = {"stream": True} | ({} if endpoint == "responses" else {"stream_options": USAGE})
    return {"model": MODEL, **said, **case, **(streamed if stream else {})}


def sent(event: Any) -> dict[str, Any]:
    """An event as it came: what the client added stays out. The published schema of a completion knows whole ones only:
    that an unfinished chunk has `finish_reason` and `usage` null is said in words (and done) by OpenAI."""
    fields = event.model_dump(mode="json", exclude_unset=True)
    if fields.get("object") == "text_completion":
        fields["choices"] = [one | {"finish_reason": one["finish_reason"] or "stop"} for one in fields["choices"]]
        fields = {name: value for name, value in fields.items() if (name, value) != ("usage", None)}
    return fields


@pytest.fixture
def generator() -> FakeGenerator:
    return FakeGenerator()


@pytest.fixture
async def url(generator: FakeGenerator) -> AsyncIterator[str]:
    async with serve(generator) as served:
        yield f"{served.url}/v1"


@pytest.mark.parametrize("script", SCRIPTS, ids=["echo", "logprobs"])
async def test_the_async_client_gets_what_the_schemas_say(generator: FakeGenerator, url: str, script: Script) -> None:
    generator.script = script
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        for endpoint, case in CASES:
            whole, event = SCHEMAS[endpoint]
            reply = await creator(client, endpoint, raw=True)(**fields_of(endpoint, case, stream=False))
            check_schema(whole, json.loads(reply.text))
            assert reply.parse().model == MODEL
            stream = await creator(client, endpoint, raw=False)(**fields_of(endpoint, case, stream=True))
            check_schema(event, *[sent(one) async for one in stream])


async def test_the_sync_client_gets_what_the_schemas_say(url: str) -> None:
    def ask() -> Iterator[tuple[str, Any]]:
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            for endpoint, case in CASES:
                whole, event = SCHEMAS[endpoint]
                reply = creator(client, endpoint, raw=True)(**fields_of(endpoint, case, stream=False))
                yield whole, json.loads(reply.text)
                for one in creator(client, endpoint, raw=False)(**fields_of(endpoint, case, stream=True)):
                    yield event, sent(one)

    for schema, reply in await asyncio.to_thread(lambda: list(ask())):
        check_schema(schema, reply)


async def test_models(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        check_schema("ListModelsResponse", json.loads((await client.models.with_raw_response.list()).text))
        check_schema("Model", json.loads((await client.models.with_raw_response.retrieve(MODEL)).text))


async def test_responses_are_made_got_gone_on_after_and_deleted(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        first = await client.responses.create(model=MODEL, input="hello")
        assert first.output_text == SAID
        assert await client.responses.retrieve(first.id) == first
        second = await client.responses.create(model=MODEL, input="hello", previous_response_id=first.id)
        assert second.output_text == f"[user]hello[assistant]{SAID}{SAID}"
        await client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(first.id)


async def test_the_clients_own_stream_of_a_response_puts_it_together(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        async with client.responses.stream(model=MODEL, input="hello") as stream:
            texts = [event.delta async for event in stream if event.type == "response.output_text.delta"]
            final = await stream.get_final_response()
        assert "".join(texts) == final.output_text == SAID


async def test_a_broken_stream_of_a_response_has_its_published_events(generator: FakeGenerator, url: str) -> None:
    generator.script = fail(WorkerLost("the worker is gone"), after=2)
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        stream = await client.responses.create(model=MODEL, input="hello", stream=True)
        events = [event async for event in stream]
    check_schema("ResponseStreamEvent", *map(sent, events))
    assert [event.type for event in events][-2:] == ["error", "response.failed"]


async def test_refusals_have_the_published_form(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        for endpoint in SCHEMAS:
            with pytest.raises(openai.BadRequestError) as bad:
                await creator(client, endpoint, raw=False)(**fields_of(endpoint, {"temperature": 3}, stream=False))
            check_schema("ErrorResponse", bad.value.response.json())
            assert bad.value.param == "temperature"
